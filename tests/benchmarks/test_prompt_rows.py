from benchmarks.prompt_rows import write_rows
from tiue.distill.prompts import read_prompts


def test_no_two_rows_have_the_same_prompt_and_it_is_the_caption(tmp_path):
    write_rows(tmp_path / "rows.jsonl", 300)
    prompts = read_prompts(tmp_path / "rows.jsonl")
    assert len(prompts) == 300
    assert prompts[7].endswith(", 7")
