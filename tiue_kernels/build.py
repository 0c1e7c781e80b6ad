"""Compiles csrc: the kernels for GPUs, the same for the host, and the CPU path's own.

`python -m tiue_kernels.compile` is the command. Imports neither torch nor the package, so that
setup.py can load this file by its path.
"""

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# What is built -> its library. `host` are the GPU kernels executed on the CPU, for tests.
LIBRARIES = {
    "cuda": "libtiue_cuda.so",
    "host": "libtiue_host.so",
    "cpu": "libtiue_cpu.so",
}
# sm_80 also runs on 8.6 and 8.9; its PTX serves GPUs newer than Hopper.
DEFAULT_ARCHS = "80+PTX;90a"
# Every access of a kernel on the host calls csrc/common/host_memory.cpp; no sanitizer is linked.
HOST_CHECKS = "-fsanitize=thread --param tsan-instrument-func-entry-exit=0"
GIB_PER_JOB = 3  # nvcc on the largest file takes 2
# The forms of the CPU library, each compiled with these instructions allowed; x86-64 has all three.
CPU_FORMS = {
    "portable": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": [
        *("-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma"),
        "-mprefer-vector-width=512",
    ],
}
# The oldest that it is compiled and tested with.
LEAST_COMPILERS = {"g++": 11, "clang++": 14}
# The oldest torch that the library loads beside, whatever the headers it is compiled with.
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"


class BuildError(RuntimeError):
    """The build cannot run here; the message says the cure."""


def source_folder() -> Path:
    folder = Path(__file__).resolve().parents[1] / "csrc"
    if not folder.is_dir():
        raise BuildError(f"{folder} is missing: build from a source tree, wheels hold no sources")
    return folder


def sources(target: str) -> list[Path]:
    """The files of a target, a key of `LIBRARIES`."""
    folder = source_folder()
    if target == "cpu":
        return sorted((folder / "cpu").glob("*.cpp"))
    own = sorted((folder / "common").glob("*.cpp")) if target == "host" else []
    return [*sorted(folder.glob("*/*.cu")), folder / "bindings.cpp", *own]


def fingerprint(target: str) -> str:
    """What a target is compiled from, as one word: of the files in csrc, headers included."""
    digest = hashlib.sha256(target.encode())
    folder = source_folder() / "cpu" if target == "cpu" else source_folder()
    for path in sorted(folder.rglob("*.*")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def find_nvcc() -> str:
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")):
        if home and (Path(home) / "bin" / "nvcc").exists():
            return str(Path(home) / "bin" / "nvcc")
    found = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if found is None:
        raise BuildError(
            "TIUE_CUDA=1 compiles CUDA C++, and nvcc was found neither in $CUDA_HOME/bin nor on "
            "PATH: install the CUDA toolkit (12.4 or newer) or set CUDA_HOME to it, or install "
            "without TIUE_CUDA, which needs no compiler"
        )
    return found


def toolkit_version() -> str:
    """nvcc's, as in 13.0: its CUDA runtime is part of the library."""
    said = subprocess.run([find_nvcc(), "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release (\d+\.\d+)", said)
    if found is None:
        raise BuildError(f"nvcc --version names no release:\n{said}")
    return found[1]


def find_ninja() -> str:
    beside = Path(sys.executable).parent / "ninja"
    found = str(beside) if beside.exists() else shutil.which("ninja")
    if found is None:
        raise BuildError("ninja was not found: pip install ninja")
    return found


def find_torch() -> Path:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise BuildError(
            "torch's headers are needed: pip install torch (2.11 or newer, a CPU build will do), "
            "then build with --no-build-isolation"
        )
    return Path(spec.origin).parent


def architectures(value: str | None = None) -> list[str]:
    """nvcc's -gencode flags for a list such as "80+PTX;90a" (default: $TIUE_CUDA_ARCHS)."""
    value = value or os.environ.get("TIUE_CUDA_ARCHS") or DEFAULT_ARCHS
    flags = []
    for entry in value.replace(",", ";").split(";"):
        arch, _, ptx = entry.strip().partition("+")
        number = arch.rstrip("af")
        if not number.isdigit() or int(number) < 80 or ptx not in ("", "PTX"):
            raise BuildError(
                f"TIUE_CUDA_ARCHS={value!r}: {entry!r} is no architecture of 80 or newer; write "
                f"for instance {DEFAULT_ARCHS!r}"
            )
        code = f"sm_{arch},compute_{arch}" if ptx else f"sm_{arch}"
        flags.append(f"'-gencode=arch=compute_{arch},code=[{code}]'")
    return flags


def job_count() -> int:
    """MAX_JOBS, or as many compilers as there are CPUs and free memory for."""
    if os.environ.get("MAX_JOBS"):
        return max(1, int(os.environ["MAX_JOBS"]))
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return max(1, cpus // 2)
    free = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) / 2**20
    return max(1, min(cpus, int(free / GIB_PER_JOB)))


def find_compiler() -> str:
    """The C++ compiler of the CPU library: $CXX, g++, clang++ or c++.

    Raises:
        BuildError: There is none, it does not run, or it is too old.
    """
    wanted = os.environ.get("CXX")
    for name in [wanted] if wanted else ["g++", "clang++", "c++"]:
        if found := shutil.which(name):
            break
    else:
        raise BuildError(
            f"CXX={wanted} was not found"
            if wanted
            else "no C++ compiler was found (g++, clang++; or set CXX): install one, for instance "
            "by `apt install g++`"
        )
    asked = [found, "-dM", "-E", "-x", "c++", "-"]
    done = subprocess.run(asked, input="", capture_output=True, text=True)
    macros = dict(re.findall(r"#define (\w+) (\d+)$", done.stdout, re.MULTILINE))
    kind, macro = ("clang++", "__clang_major__")
    if macro not in macros:
        kind, macro = ("g++", "__GNUC__")
    if macro not in macros:
        raise BuildError(f"{found} is neither g++ nor clang++: set CXX to one of them")
    if int(macros[macro]) < LEAST_COMPILERS[kind]:
        least = " or ".join(f"{name} {number}" for name, number in LEAST_COMPILERS.items())
        raise BuildError(
            f"{found} is {kind} {macros[macro]}; the CPU library needs {least}, or newer: install "
            "one and set CXX to it"
        )
    return found


def version() -> str:
    """The package's, which the CPU library is marked with."""
    text = (Path(__file__).parent / "__init__.py").read_text("utf-8")
    return re.findall(r'^__version__ = "([^"]+)"', text, re.MULTILINE)[0]


def _build_cpu(library: Path, work: Path) -> None:
    """Needs a compiler and nothing else: neither torch nor ninja is there when pip installs."""
    compiler = find_compiler()
    machine = subprocess.run([compiler, "-dumpmachine"], capture_output=True, text=True).stdout
    forms = CPU_FORMS if machine.startswith("x86_64") else {"portable": []}
    flags = ["-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fPIC", "-Wall"]
    flags += ["-fvisibility=hidden", "-fno-exceptions", f'-DTIUE_VERSION="{version()}"']
    commands, objects = [], []
    for source in sources("cpu"):
        for form, instructions in forms.items():
            if source.stem == "library" and form != "portable":
                continue
            objects.append(str(work / f"{source.stem}_{form}.o"))
            own = [*flags, *instructions, f"-DTIUE_FORM={form}"]
            commands.append([compiler, *own, "-c", str(source), "-o", objects[-1]])
    with ThreadPoolExecutor(job_count()) as pool:
        list(pool.map(_run, commands))
    # A library that is loaded must not be written into.
    fresh = library.with_suffix(f".{os.getpid()}")
    link = ["-shared", "-static-libgcc", "-static-libstdc++", *objects, "-o", str(fresh), "-lm"]
    _run([compiler, *link])
    fresh.replace(library)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"csrc does not compile:\n{' '.join(command)}\n{done.stderr[-8000:]}")


def _rules(target: str, namespace: str | None) -> dict[str, str]:
    torch = find_torch()
    common = f"-std=c++17 {TORCH_TARGET} -isystem {torch}/include"
    named = f" -DTIUE_NAMESPACE={namespace}" if namespace else ""
    hidden = "-fPIC -fvisibility=hidden -fvisibility-inlines-hidden"
    libraries = f"-L{torch}/lib -ltorch -ltorch_cpu"
    compiler = os.environ.get("CXX", "g++")
    link = f"{compiler} -shared $in -o $out {libraries}"
    if target == "host":
        # setjmp and longjmp switch stacks, which fortified builds take for an error.
        flags = f"{common} {hidden} -DTIUE_HOST -O2 -U_FORTIFY_SOURCE -Wall -Wno-unknown-pragmas"
        compiled = "-MMD -MF $out.d -x c++ -c $in -o $out"
        return {
            "cuda": f"{compiler} {flags} {HOST_CHECKS} {compiled}",
            "cpp": f"{compiler} {flags}{named} {compiled}",
            "link": link,
        }
    nvcc = find_nvcc()
    options = f"--compiler-options '{hidden} -Wall' -O3"
    archs = " ".join(architectures())
    compile_flags = f"{common} {options} -cudart static -Xptxas -v -MD -MF $out.d"
    return {
        # The log of each file stays beside its object: tests read register counts from it.
        "cuda": f"{nvcc} {compile_flags} {archs} -c $in -o $out 2> $out.log"
        " || (cat $out.log; false)",
        "cpp": f"{nvcc} -x c++ {common}{named} {options} -MD -MF $out.d -c $in -o $out",
        "link": f"{nvcc} -shared -cudart static {archs} $in -o $out {libraries} -ldl",
    }


def _build_with_ninja(target: str, library: Path, work: Path, namespace: str | None) -> None:
    rules = _rules(target, namespace)
    lines = []
    for name, command in rules.items():
        depends = "" if name == "link" else "\n  depfile = $out.d\n  deps = gcc"
        lines.append(f"rule {name}\n  command = {command}{depends}")
    compiled = []
    for source in sources(target):
        rule = "cuda" if source.suffix == ".cu" else "cpp"
        named = f"_{namespace}" if namespace and rule == "cpp" else ""
        compiled.append(f"{source.parent.name}_{source.stem}{named}.o")
        lines.append(f"build {compiled[-1]}: {rule} {source}")
    lines.append(f"build {library}: link {' '.join(compiled)}\n")
    (work / "build.ninja").write_text("\n".join(lines))
    done = subprocess.run(
        [find_ninja(), "-C", str(work), "-j", str(job_count())], capture_output=True, text=True
    )
    if done.returncode:
        raise BuildError(f"csrc does not compile:\n{done.stdout[-8000:]}{done.stderr[-2000:]}")


def build(
    target: str, output: Path, objects: Path | None = None, namespace: str | None = None
) -> Path:
    """Compile what has changed and return the library's path; the CPU's is compiled as a whole.

    Args:
        target: "cuda" for GPUs with nvcc, "host" for the same kernels on the CPU, or "cpu" for the
            CPU path's own, both with g++.
        output: folder of the library.
        objects: folder of objects and logs; by default one of the target in the cache folder.
        namespace: of the operators, where it is not the package's; the CPU's has none.

    Raises:
        BuildError: a tool is missing, or the compiler refuses.
    """
    work = objects or cache_folder() / target
    output.mkdir(parents=True, exist_ok=True)
    work.mkdir(parents=True, exist_ok=True)
    library = output.resolve() / LIBRARIES[target]
    made_of = [fingerprint(target)]
    if target == "cpu":
        record = library.with_suffix(".sources")
        if not (library.exists() and record.exists() and record.read_text().split() == made_of):
            _build_cpu(library, work)
    else:
        _build_with_ninja(target, library, work, namespace)
    if target == "cuda":
        made_of.append(toolkit_version())
    library.with_suffix(".sources").write_text("\n".join(made_of))
    return library


def cache_folder() -> Path:
    """Where the host library is kept between runs: one folder a checkout."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    name = hashlib.sha256(str(source_folder()).encode()).hexdigest()[:12]
    return Path(base) / "tiue_kernels" / name
