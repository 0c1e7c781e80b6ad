import pytest
from transformers import AutoTokenizer, CLIPTokenizer

from tiue.embedded.teacher import tokenize, train_tokenizer
from tiue.openmoji.config import MAX_PROMPT_TOKENS, TEN_PROMPTS


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(list(TEN_PROMPTS), 560, MAX_PROMPT_TOKENS)


@pytest.mark.parametrize("loader", [CLIPTokenizer, AutoTokenizer])
def test_a_saved_tokenizer_reads_prompts_the_same(tokenizer, loader, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = loader.from_pretrained(tmp_path)
    prompts = [*TEN_PROMPTS, "Zebra \u2603 \u00fc\u4e2d", ""]
    assert tokenize(loaded, prompts).equal(tokenize(tokenizer, prompts))
    assert loaded.model_max_length == MAX_PROMPT_TOKENS


@pytest.mark.parametrize("text", ["red apple", "qwx zebra", "\u2603 \u00fc \u4e2d", "\U0001f34e"])
def test_any_text_comes_back_from_its_tokens(tokenizer, text):
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.eos_token_id not in ids[1:-1]  # CLIP's unknown token is its end token


def test_prompts_are_lower_cased_and_padded(tokenizer):
    ids = tokenize(tokenizer, ["Red APPLE", "red apple"])
    assert ids.shape == (2, MAX_PROMPT_TOKENS)
    assert ids[0].equal(ids[1])
    assert ids[0, 0] == tokenizer.bos_token_id
    assert ids[0, -1] == tokenizer.pad_token_id


def test_learned_words_are_shorter_than_unknown_ones(tokenizer):
    assert len(tokenizer) == 560
    assert len(tokenizer.tokenize("octopus")) < len(tokenizer.tokenize("zyxwvuq"))


def test_training_again_gives_the_same_tokenizer(tokenizer):
    for _ in range(5):
        again = train_tokenizer(list(TEN_PROMPTS), 560, MAX_PROMPT_TOKENS)
        assert again.get_vocab() == tokenizer.get_vocab()
        assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
