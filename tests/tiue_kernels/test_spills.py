from tests.tiue_kernels.spills import Allowed, complaints


def test_complaints() -> None:
    spills = {"a": 0, "b": 8, "c": 16}
    assert complaints(spills, {"b": Allowed(8, "why"), "c": Allowed(24, "why")}) == []
    assert complaints(spills, {"b": Allowed(8, "why"), "c": Allowed(8, "why")}) == [
        "c spills 16 bytes"
    ]
    assert complaints({"b": 8}, {}) == ["b spills 8 bytes"]
    assert complaints({"b": 8}, {"b": Allowed(8, "")}) == ["b may spill for no reason"]
    stale = {"a": Allowed(8, "why"), "d": Allowed(8, "why")}
    assert complaints({"a": 0}, stale) == [
        f"{name} spills nothing or is gone: take its entry out" for name in "ad"
    ]
