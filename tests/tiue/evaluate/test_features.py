"""Feature extractors from local files, tiny ones of the real classes."""

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2Model,
)

from tests.tiue.tiny import TEXT_LENGTH, tiny_tokenizer
from tiue.errors import CheckpointError, InputError, NonFiniteError
from tiue.evaluate import lpips
from tiue.evaluate.features import Clip, extract, load_extractor, load_pair_encoder
from tiue.files import sha256

CPU = torch.device("cpu")


class FixedInception(nn.Module):
    """Has the call of the published TorchScript file, and 2,048 features that are easily known."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, pictures: Tensor, return_features: bool = False) -> Tensor:
        means = pictures.float().mean(dim=[1, 2, 3])
        return means[:, None].expand(-1, self.width) if return_features else means


@pytest.fixture(scope="module")
def pictures():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (3, 3, 32, 32), generator=generator, dtype=torch.uint8)


def save_inception(path, width: int = 2048):
    torch.jit.script(FixedInception(width)).save(str(path))
    return path


def test_inception_is_read_from_its_file(tmp_path, pictures):
    path = save_inception(tmp_path / "inception.pt")
    extractor = load_extractor("inception", str(path), CPU)
    want = pictures.float().mean(dim=(1, 2, 3))
    torch.testing.assert_close(extractor(pictures)[:, 7], want)
    assert extractor.describe() == {
        "kind": "inception",
        "file": "inception.pt",
        "sha256": sha256(path),
    }


def test_inception_is_looked_for_where_torch_hub_keeps_it(tmp_path, pictures, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    place = tmp_path / "checkpoints" / "inception-2015-12-05.pt"
    with pytest.raises(CheckpointError) as error:
        load_extractor("inception", None, CPU)
    message = str(error.value)
    assert f"there is no file {place}" in message
    assert "https://nvlabs-fi-cdn.nvidia.com/" in message
    assert "--features-weights" in message
    place.parent.mkdir()
    save_inception(place)
    assert load_extractor("inception", None, CPU)(pictures).shape == (3, 2048)


def test_another_network_is_no_inception(tmp_path, pictures):
    path = save_inception(tmp_path / "small.pt", width=5)
    with pytest.raises(CheckpointError, match="not those of FID's Inception"):
        load_extractor("inception", str(path), CPU)(pictures)
    path.write_bytes(b"no archive")
    with pytest.raises(CheckpointError, match="fetch it again"):
        load_extractor("inception", str(path), CPU)


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dinov2")
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=224, patch_size=56
    )
    Dinov2Model(config).save_pretrained(folder)
    return folder


def test_dinov2_is_its_class_token_at_224(dinov2, pictures):
    extractor = load_extractor("dinov2", str(dinov2), CPU)
    assert extractor.width == 16
    model = Dinov2Model.from_pretrained(dinov2).eval()
    shown = torch.full((1, 3, 32, 32), 128, dtype=torch.uint8)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in
                 ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))  # fmt: skip
    pixels = (torch.full((1, 3, 224, 224), 128 / 255) - mean) / std
    with torch.no_grad():
        want = model(pixels).last_hidden_state[:, 0]
    torch.testing.assert_close(extractor(shown), want, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    sizes = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }  # fmt: skip
    text = CLIPTextConfig(
        **sizes, vocab_size=len(tokenizer), max_position_embeddings=TEXT_LENGTH,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id,
    )  # fmt: skip
    vision = CLIPVisionConfig(**sizes, image_size=32, patch_size=8)
    config = CLIPConfig(
        text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8
    )
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"height": 32, "width": 32}
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=size).save_pretrained(folder)
    return folder


def test_clip_score_is_what_the_model_itself_says(clip, pictures):
    """logits_per_image over the temperature are the cosines."""
    encoder = load_pair_encoder(str(clip), CPU)
    texts = ["a", "bcd", "a long prompt of many letters that is cut"]
    got = nn.functional.cosine_similarity(
        encoder.embed_pictures(pictures), encoder.embed_texts(texts)
    )
    model = CLIPModel.from_pretrained(clip).eval()
    tokens = encoder.tokenizer(
        texts, padding="max_length", truncation=True, max_length=TEXT_LENGTH, return_tensors="pt"
    )
    pixels = encoder.processor(images=list(pictures), return_tensors="pt")
    with torch.no_grad():
        out = model(**tokens, **pixels)
    want = out.logits_per_image.diagonal() / model.logit_scale.exp()
    torch.testing.assert_close(got, want.detach(), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(
        nn.functional.normalize(load_extractor("clip", str(clip), CPU)(pictures)),
        out.image_embeds,
        rtol=1e-4,
        atol=1e-5,
    )
    assert isinstance(encoder, Clip)
    assert encoder.describe() == {"kind": "clip", "source": clip.name}


@pytest.mark.parametrize("kind", ["dinov2", "clip"])
def test_missing_folders_of_transformers_are_named(kind, tmp_path):
    with pytest.raises(CheckpointError, match="there is no folder"):
        load_extractor(kind, str(tmp_path / "missing"), CPU)
    with pytest.raises(CheckpointError, match=r"copy the repository .* into a folder"):
        load_extractor(kind, str(tmp_path), CPU)


def test_unknown_features_are_refused():
    with pytest.raises(InputError, match="take inception, dinov2, clip or openmoji"):
        load_extractor("vgg", None, CPU)


def test_alexnet_is_read_from_its_published_layout(tmp_path, monkeypatch):
    torch.manual_seed(0)
    network = lpips.AlexNetMaps()
    kept = {n: v for n, v in network.state_dict().items() if n.startswith("features.")}
    path = tmp_path / "alexnet.pth"
    torch.save({**kept, "classifier.1.weight": torch.zeros(2)}, path)
    loaded, weights = lpips.load_alexnet(path, CPU)
    shown = torch.randint(256, (1, 3, 40, 40), dtype=torch.uint8)
    for one, other in zip(loaded(shown), network(shown), strict=True):
        torch.testing.assert_close(one, other)
    assert [len(w) for w in weights] == [64, 192, 384, 256, 256]
    torch.save({"features.0.weight": torch.zeros(3)}, path)
    with pytest.raises(CheckpointError, match=r"cannot read|another network"):
        lpips.load_alexnet(path, CPU)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(CheckpointError, match=r"alexnet-owt-7be5be79.pth"):
        lpips.load_alexnet(None, CPU)


def test_features_that_are_not_finite_are_no_features(pictures):
    def broken(batch):
        return torch.full((len(batch), 2), float("nan"))

    with pytest.raises(NonFiniteError, match="features of set a"):
        extract(broken, [pictures], 3, "features of set a", progress=False)
