import pytest
import torch

from tests.tiue.tiny import TEXT_DIM, TEXT_LENGTH, tiny_text_encoder, tiny_tokenizer
from tiue.distill.data import PromptOrder
from tiue.distill.prompts import read_prompts
from tiue.distill.text import EncodedPrompts, TextEncoder
from tiue.errors import InputError


def test_read_prompts_drops_blanks_and_repeats_and_keeps_the_order(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\ufeffred apple\n\n  rocket \nred apple\n\t\nÄpfel\n", encoding="utf-8")
    assert read_prompts(path) == ["red apple", "rocket", "Äpfel"]


@pytest.mark.parametrize("content", [None, b"\n \n", b"\xff\xfe\x00"])
def test_read_prompts_refuses_what_holds_none(tmp_path, content):
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match="one prompt a line"):
        read_prompts(path)


def test_prompt_order_visits_every_prompt_once_an_epoch():
    order = PromptOrder(7, seed=0)
    epochs = order[range(21)].view(3, 7)
    assert epochs.sort(dim=1).values.tolist() == [list(range(7))] * 3
    assert not torch.equal(epochs[0], epochs[1])


def test_prompt_order_is_the_same_from_any_place():
    whole = PromptOrder(7, seed=3)[range(40)]
    other = PromptOrder(7, seed=3)
    parts = [other[range(start, start + 5)] for start in (35, 0, 5, 10, 15, 20, 25, 30)]
    assert torch.equal(torch.cat(parts[1:] + parts[:1]), whole)
    assert not torch.equal(PromptOrder(7, seed=4)[range(40)], whole)


@pytest.fixture
def embeddings():
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    encoder = tiny_text_encoder(len(tokenizer))
    prompts = [f"prompt {i}" for i in range(70)]  # more than one batch of the encoder

    def make(cache_bytes):
        return EncodedPrompts(prompts, TextEncoder(tokenizer, encoder), cache_bytes)

    return make


def test_cached_embeddings_equal_those_made_when_asked_for(embeddings):
    cached, live = embeddings(1 << 20), embeddings(0)
    assert cached.cached
    assert not live.cached
    indices = torch.tensor([69, 0, 3])
    assert cached[indices].tokens.shape == (3, TEXT_LENGTH, TEXT_DIM)
    torch.testing.assert_close(cached[indices].tokens, live[indices].tokens)
    assert not torch.allclose(*cached[indices].tokens[:2])


def test_cache_is_made_only_where_it_fits(embeddings):
    needed = 70 * TEXT_LENGTH * TEXT_DIM * 4
    assert embeddings(needed).cached
    assert not embeddings(needed - 1).cached


def test_embeddings_are_what_the_pipeline_gives(embeddings):
    from tests.tiue.tiny import tiny_pipeline

    pipe = tiny_pipeline()
    made = EncodedPrompts(["a house"], TextEncoder(pipe.tokenizer, pipe.text_encoder), 0)
    expected, empty = pipe.encode_prompt("a house", "cpu", 1, True)
    torch.testing.assert_close(made[torch.tensor([0])].tokens, expected)
    torch.testing.assert_close(made.empty.tokens, empty)


def test_a_prompt_that_is_too_long_is_named(caplog):
    tokenizer = tiny_tokenizer()
    encoder = tiny_text_encoder(len(tokenizer))
    long = "a b c d e f g h i j k l m n o p q r s t"
    EncodedPrompts(["short", long], TextEncoder(tokenizer, encoder), 1 << 20)
    assert [record.args[1] for record in caplog.records] == [long]
