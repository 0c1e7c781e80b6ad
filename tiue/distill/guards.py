"""What stops a run: figures that are not finite, figures that run away, and signals."""

import math
import signal
import threading
from types import FrameType
from typing import Any

from tiue.errors import DivergenceError, NonFiniteError

_CURE = (
    "Nothing of this step was applied. Go on from the last checkpoint with lower rates (--resume "
    "--allow-change learning_rate --learning-rate ...), or in float32 (--resume --mixed-precision "
    "no)."
)


class Guard:
    """Looks at an update's figures before it is applied.

    A figure that stays above `factor` times its running mean for `PATIENCE` updates has run away;
    no checkpoint is written meanwhile (`suspicious`), so the last one is from before.

    Args:
        factor: Times the running mean; 0 watches for NaN and infinity alone.
        scaled: Whether gradients are scaled as float16 needs: an infinite norm is met on purpose
            there, and the update skipped.
    """

    WARMUP = 50
    PATIENCE = 10
    DECAY = 0.98

    def __init__(self, factor: float, scaled: bool = False) -> None:
        self.factor, self.scaled = factor, scaled
        self._means: dict[str, float] = {}
        self._counts: dict[str, int] = {}
        self._streaks: dict[str, int] = {}

    @property
    def suspicious(self) -> bool:
        """Whether a figure is above its bound now."""
        return any(self._streaks.values())

    def check(self, figures: dict[str, float], step: int) -> None:
        """Refuse an update.

        Args:
            figures: Losses and gradient norms by name; norms are called `*_norm`.
            step: The student update at hand, counted from 1.

        Raises:
            NonFiniteError: If one is NaN or infinite.
            DivergenceError: If one has run away.
        """
        for name, value in figures.items():
            if math.isfinite(value):
                self._follow(name, abs(value), step)
            elif not (self.scaled and name.endswith("_norm")):
                raise NonFiniteError(f"{name} is {value} at step {step}. {_CURE}")

    def _follow(self, name: str, value: float, step: int) -> None:
        count, mean = self._counts.get(name, 0), self._means.get(name, 0.0)
        if self.factor and count >= self.WARMUP and value > self.factor * mean > 0:
            self._streaks[name] = self._streaks.get(name, 0) + 1
            if self._streaks[name] >= self.PATIENCE:
                raise DivergenceError(
                    f"{name} is {value:.3g} at step {step}, and was {mean:.3g} in the mean before "
                    f"the last {self.PATIENCE} updates: the run diverges. {_CURE}"
                )
            return  # the mean does not follow what it is there to notice
        self._streaks[name] = 0
        self._counts[name] = count + 1
        # The plain mean at first, then a running one.
        decay = min(self.DECAY, count / (count + 1))
        self._means[name] = decay * mean + (1 - decay) * value

    def state_dict(self) -> dict[str, Any]:
        """The running means, for a checkpoint."""
        return {"means": self._means, "counts": self._counts, "streaks": self._streaks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self._means, self._counts = dict(state["means"]), dict(state["counts"])
        self._streaks = dict(state["streaks"])


class Signals:
    """Notes signals inside its context, so that a step can be finished.

    SIGINT and SIGTERM ask for the end; the second one ends the program at once. SIGUSR1, which
    schedulers send some time before the end, asks for a checkpoint. Outside of the main thread,
    where Python allows no handlers, nothing is noted.

    Attributes:
        stop: Number of the signal that asked for the end, or 0.
        checkpoint: Whether a checkpoint is asked for.
    """

    def __init__(self) -> None:
        self.stop = 0
        self.checkpoint = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():
            noted: dict[signal.Signals, Any] = {signal.SIGINT: self._end, signal.SIGTERM: self._end}
            if hasattr(signal, "SIGUSR1"):  # not on Windows
                noted[signal.SIGUSR1] = self._keep
            self._before = {number: signal.signal(number, note) for number, note in noted.items()}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _end(self, number: int, _frame: FrameType | None) -> None:
        if self.stop:
            raise KeyboardInterrupt
        self.stop = number

    def _keep(self, _number: int, _frame: FrameType | None) -> None:
        self.checkpoint = True
