"""CLIPCap: model, loss and generation against ClipCap written out, step by step and without a cache."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModel, CLIPVisionModelWithProjection, GPT2Config, GPT2LMHeadModel

from rsedge.errors import OptionError
from rsedge.runtime.decoding.options import DecodingOptions
from rsedge.runtime.decoding.search import draw
from rsedge.training.losses import caption_loss_sum
from rsedge.training.models.clipcap_model import (
    DEFAULTS,
    ClipCapConfig,
    ClipCapModel,
    _beam_search,
    generate,
    register_auto_classes,
)

pytestmark = pytest.mark.usefixtures("one_thread")

STOP = 13
PREFIX = 5
VOCABULARY = 40
TEXT = {
    "n_layer": 2,
    "n_embd": 16,
    "n_head": 2,
    "vocab_size": VOCABULARY,
    "n_positions": 40,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
VISION = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 8,
    "patch_size": 4,
}
CLIP = {"model_type": "clip_vision_model", "projection_dim": 12, **VISION}
SIGLIP = {"model_type": "siglip_vision_model", **VISION}


def make(mapper: str = "mlp", vision: dict = CLIP, seed: int = 0, stop: float = 1.0, **settings) -> ClipCapModel:
    """A tiny random model whose captions differ between images and end at different lengths."""
    torch.manual_seed(seed)
    values = {"prefix_length": PREFIX, "mapper": mapper, "mapper_layers": 2, "mapper_heads": 4, **settings}
    model = ClipCapModel(ClipCapConfig(vision, TEXT, **values)).eval()
    with torch.no_grad():
        for name, value in model.language_model.named_parameters():
            if "wte" in name:
                value.normal_(std=0.6)  # the head too, being tied
                value[STOP] *= stop  # above 1, captions end early
            elif "wpe" in name:
                value.normal_(std=2.0)
            elif value.ndim == 2:
                value.normal_(std=0.5)
        for value in model.mapper.parameters():
            value.mul_(3)
    return model


def pictures(count: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def embeddings(count: int, seed: int = 1, width: int = 12) -> torch.Tensor:
    values = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    return nn.functional.normalize(values, dim=1)


def captions(rows: int, length: int, seed: int = 2) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tiny matrices: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# The model


@pytest.mark.parametrize("mapper", ["mlp", "transformer"])
@pytest.mark.parametrize("vision", [CLIP, SIGLIP])
@pytest.mark.parametrize("shard", ["1GB", "10KB"])
def test_a_saved_model_is_loaded_as_it_was(tmp_path: Path, mapper, vision, shard):
    model = make(mapper, vision, clip_length=3, mapper_dropout=0.1, mapper_ratio=1.5)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "10KB")
    loaded, info = ClipCapModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    settings = ("prefix_length", "clip_length", "mapper", "mapper_dropout", "mapper_ratio", "image_width")
    for config in (loaded.config, model.config):
        assert [getattr(config, name) for name in settings] == [PREFIX, 3, mapper, 0.1, 1.5, config.image_width]
    assert loaded.config.vision_config.model_type == vision["model_type"]
    words = captions(2, 4)
    assert torch.equal(loaded(pictures(2), words).logits, model(pictures(2), words).logits)
    assert loaded.language_model.lm_head.weight is loaded.language_model.transformer.wte.weight


def test_auto_classes_know_it_once_registered(tmp_path: Path):
    make().save_pretrained(tmp_path)
    register_auto_classes()
    register_auto_classes()
    assert isinstance(AutoModel.from_pretrained(tmp_path), ClipCapModel)


def test_parameters_are_named_and_shaped_as_in_clipcap():
    names = {name: tuple(value.shape) for name, value in make("mlp").mapper.state_dict().items()}
    half, whole = 16 * PREFIX // 2, 16 * PREFIX
    assert names == {
        "model.0.weight": (half, 12),
        "model.0.bias": (half,),
        "model.2.weight": (whole, half),
        "model.2.bias": (whole,),
    }
    names = {name: tuple(value.shape) for name, value in make("transformer", clip_length=3).mapper.state_dict().items()}
    layer = "transformer.layers.1."
    assert {name: shape for name, shape in names.items() if not name.startswith("transformer")} == {
        "linear.weight": (3 * 16, 12),
        "linear.bias": (3 * 16,),
        "prefix_const": (PREFIX, 16),
    }
    assert {name.removeprefix(layer): shape for name, shape in names.items() if name.startswith(layer)} == {
        "norm1.weight": (16,),
        "norm1.bias": (16,),
        "attn.to_queries.weight": (16, 16),
        "attn.to_keys_values.weight": (32, 16),
        "attn.project.weight": (16, 16),
        "attn.project.bias": (16,),
        "norm2.weight": (16,),
        "norm2.bias": (16,),
        "mlp.fc1.weight": (32, 16),
        "mlp.fc1.bias": (32,),
        "mlp.fc2.weight": (16, 32),
        "mlp.fc2.bias": (16,),
    }


def written_out_mapper(model: ClipCapModel, images: np.ndarray) -> np.ndarray:
    """The mapper in float64 numpy, from the description of ClipCap."""
    weights = {name: value.double().numpy() for name, value in model.mapper.state_dict().items()}
    if model.config.mapper == "mlp":
        hidden = np.tanh(images @ weights["model.0.weight"].T + weights["model.0.bias"])
        return (hidden @ weights["model.2.weight"].T + weights["model.2.bias"]).reshape(len(images), PREFIX, 16)

    def norm(x, name):
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    out = []
    for image in images:
        x = (weights["linear.weight"] @ image + weights["linear.bias"]).reshape(model.config.clip_length, 16)
        x = np.concatenate([x, weights["prefix_const"]])
        for layer in range(model.config.mapper_layers):
            name = f"transformer.layers.{layer}"
            y = norm(x, f"{name}.norm1")
            queries = y @ weights[f"{name}.attn.to_queries.weight"].T
            keys, values = np.split(y @ weights[f"{name}.attn.to_keys_values.weight"].T, 2, axis=1)
            mixed = np.empty_like(queries)
            for head in range(4):
                part = slice(4 * head, 4 * head + 4)
                scores = np.exp(queries[:, part] @ keys[:, part].T / np.sqrt(4))
                mixed[:, part] = scores / scores.sum(1, keepdims=True) @ values[:, part]
            x = x + mixed @ weights[f"{name}.attn.project.weight"].T + weights[f"{name}.attn.project.bias"]
            y = norm(x, f"{name}.norm2") @ weights[f"{name}.mlp.fc1.weight"].T + weights[f"{name}.mlp.fc1.bias"]
            x = x + np.maximum(y, 0) @ weights[f"{name}.mlp.fc2.weight"].T + weights[f"{name}.mlp.fc2.bias"]
        out.append(x[model.config.clip_length :])
    return np.array(out)


@pytest.mark.parametrize("mapper", ["mlp", "transformer"])
def test_the_mapper_is_the_written_out_one(mapper):
    model, images = make(mapper, clip_length=3), embeddings(3)
    expected = written_out_mapper(model, images.double().numpy())
    np.testing.assert_allclose(model.prefix(images).detach().numpy(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("vision", [CLIP, SIGLIP])
def test_image_embeddings_are_the_encoders_at_unit_length(vision):
    model = make(vision=vision)
    output = model.encoder(pixel_values=pictures(3))
    raw = output.image_embeds if vision is CLIP else output.pooler_output
    torch.testing.assert_close(model.embed_images(pictures(3)), raw / raw.norm(dim=1, keepdim=True))


def test_logits_are_gpt2s_behind_the_prefix():
    model, words = make(), captions(3, 6)
    prefix = model.prefix(embeddings(3))
    inputs = torch.cat([prefix, model.language_model.transformer.wte(words)], dim=1)
    expected = model.language_model(inputs_embeds=inputs).logits[:, PREFIX - 1 : -1]
    found = model(image_embeds=embeddings(3), input_ids=words).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_loss_is_the_mean_over_words_and_the_stop_token():
    model, words = make(), captions(2, 5)
    words[0, 3:], words[1, 4] = 0, STOP  # the first caption has three tokens, the second five
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    labels = words.masked_fill(mask == 0, -100)
    found = model(pictures(2), words, mask, labels)
    log_probs = found.logits.double().log_softmax(-1)
    picked = log_probs.gather(2, words[:, :, None])[:, :, 0]
    expected = -(picked[0, :3].sum() + picked[1].sum()) / 8
    assert found.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert caption_loss_sum(found.logits, labels).item() == pytest.approx(8 * expected.item(), rel=1e-5)


def test_padding_changes_nothing_before_it():
    model, words = make(), captions(2, 5)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    padded, other = words.clone(), words.clone()
    other[0, 3:] = 7
    first, second = (model(pictures(2), rows, mask).logits for rows in (padded, other))
    torch.testing.assert_close(first[0, :3], second[0, :3])
    alone = model(pictures(2)[:1], words[:1, :3]).logits
    torch.testing.assert_close(first[:1, :3], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("counts", [[1, 3, 2], torch.tensor([1, 3, 2])])
def test_an_image_with_several_captions_is_run_once(counts):
    model, words = make(), captions(6, 4)
    seen = []
    handle = model.encoder.register_forward_hook(lambda *_, **kwargs: seen.append(1))
    shapes = []
    model.mapper.register_forward_hook(lambda _, inputs, output: shapes.append(len(output)))
    found = model(pictures(3), words, captions_per_image=counts)
    handle.remove()
    assert (len(seen), shapes) == (1, [3])
    repeated = pictures(3)[[0, 1, 1, 1, 2, 2]]
    torch.testing.assert_close(found.logits, model(repeated, words).logits, rtol=1e-4, atol=1e-5)
    assert len(found.image_embeds) == 3


def test_frozen_parts_learn_nothing_and_drop_nothing():
    model = make("mlp")
    model.encoder.requires_grad_(False)
    model.language_model.requires_grad_(False)
    model.train()
    assert model.mapper.training
    assert not model.encoder.training
    assert not model.language_model.training
    words = captions(2, 4)
    first, second = (model(pictures(2), words, labels=words) for _ in range(2))
    assert torch.equal(first.logits, second.logits)  # GPT-2's dropout of 0.1 is off
    first.loss.backward()
    learning = {name.split(".")[0] for name, value in model.named_parameters() if value.grad is not None}
    assert learning == {"mapper"}


def test_a_model_is_made_of_trained_parts():
    torch.manual_seed(0)
    encoder = CLIPVisionModelWithProjection(make().config.vision_config)
    text = GPT2LMHeadModel(GPT2Config(**TEXT))
    before = [value.clone() for part in (encoder, text) for value in part.parameters()]
    words = captions(2, 6)
    logits, images = text.eval()(words).logits, encoder.eval()(pictures(2)).image_embeds
    model = ClipCapModel.from_parts(encoder, text, prefix_length=3, mapper="transformer", mapper_layers=1)
    assert model.encoder is encoder
    assert model.language_model is text
    for value, kept in zip((v for part in (encoder, text) for v in part.parameters()), before, strict=True):
        assert torch.equal(value, kept)
    assert torch.equal(model.eval().language_model(words).logits, logits)  # the same attention too
    assert torch.equal(model.encoder(pictures(2)).image_embeds, images)
    assert 0.5 < model.mapper.prefix_const.std() < 1.5
    assert model.mapper.linear.weight.abs().max() <= 1 / np.sqrt(12) + 1e-6  # torch's own start, as ClipCap's


def test_no_token_sees_those_behind_it():
    encoder = CLIPVisionModelWithProjection(make().config.vision_config)
    parts = ClipCapModel.from_parts(encoder, GPT2LMHeadModel(GPT2Config(**TEXT)), prefix_length=PREFIX).eval()
    words = captions(1, 6)
    other = words.clone()
    other[0, 3] += 1
    for model in (make(), parts):
        first, second = (model(pictures(1), rows).logits for rows in (words, other))
        assert torch.equal(first[:, :4], second[:, :4])
        assert not torch.allclose(first[:, 4], second[:, 4])


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"mapper": "linear"}, "mapper is 'linear', expected one of mlp, transformer"),
        ({"prefix_length": 0, "mapper_layers": -1}, r"prefix_length is 0.*mapper_layers is -1"),
        ({"mapper": "transformer", "mapper_heads": 3}, "does not divide GPT-2's width 16"),
        ({"prefix_length": 40}, "GPT-2 has 40 positions"),
        ({"mapper_dropout": 1.0}, "mapper_dropout is 1.0"),
        ({"stop_token_id": 40}, "stop_token_id is 40"),
        ({"vision_config": {"model_type": "vit"}}, "'vit', expected one of clip_vision_model, siglip_vision_model"),
    ],
)
def test_a_config_refuses_what_is_wrong(values, words):
    with pytest.raises(OptionError, match=words):
        ClipCapConfig(**{"vision_config": CLIP, "text_config": TEXT, "prefix_length": PREFIX, **values})


def test_inputs_that_do_not_fit_are_named():
    model, words = make(), captions(3, 4)
    with pytest.raises(ValueError, match="3 rows of input_ids for 2 of images"):
        model(pictures(2), words)
    with pytest.raises(ValueError, match="either"):
        model(pictures(3), words, image_embeds=embeddings(3))
    with pytest.raises(ValueError, match="either"):
        model(input_ids=words)
    with pytest.raises(ValueError, match="positions for 36"):
        model(pictures(2), captions(2, 37))


# Generation


def next_logits(model: ClipCapModel, prefix: torch.Tensor, tokens: list[int]) -> torch.Tensor:
    """The next token's logits, everything recomputed."""
    words = model.language_model.transformer.wte(torch.tensor([tokens], dtype=torch.int64))
    logits = model.language_model(inputs_embeds=torch.cat([prefix, words], dim=1), use_cache=False).logits[0, -1]
    return logits.detach().float()


def plain_beam_search(model: ClipCapModel, image: torch.Tensor, beams: int, longest: int) -> tuple[list[int], float]:
    """One image, one hypothesis at a time, every candidate of the whole vocabulary ranked."""
    prefix = model.prefix(image[None])
    first = next_logits(model, prefix, []).log_softmax(0)
    hypotheses = [([token], first[token]) for token in first.argsort(descending=True)[:beams].tolist()]
    for _ in range(longest - 1):
        candidates = []
        for tokens, total in hypotheses:
            if tokens[-1] == STOP:
                candidates.append((tokens, total))
                continue
            steps = next_logits(model, prefix, tokens).log_softmax(0)
            candidates += [([*tokens, token], total + steps[token]) for token in range(VOCABULARY)]
        candidates.sort(key=lambda entry: -float(entry[1] / len(entry[0])))
        hypotheses = candidates[:beams]
        if all(tokens[-1] == STOP for tokens, _ in hypotheses):
            break
    return max(((tokens, float(total / len(tokens))) for tokens, total in hypotheses), key=lambda entry: entry[1])


@pytest.mark.parametrize("mapper", ["mlp", "transformer"])
@pytest.mark.parametrize("stop", [1.0, 1.4])
@pytest.mark.parametrize(("beams", "longest"), [(1, 12), (3, 12), (5, 20), (5, 1), (2, 2)])
def test_search_gives_what_recomputing_everything_gives(mapper, stop, beams, longest):
    model, images = make(mapper, seed=3, stop=stop), embeddings(8)
    found = generate(model, images, DecodingOptions(num_beams=beams, max_new_tokens=longest))
    for caption, image in zip(found, images, strict=True):
        tokens, score = plain_beam_search(model, image, beams, longest)
        assert list(caption.token_ids) == tokens
        assert caption.score == pytest.approx(score, abs=1e-4)


def test_the_captions_compared_are_worth_comparing():
    found = generate(make("mlp", seed=3), embeddings(8), DecodingOptions(num_beams=5, max_new_tokens=20))
    tokens = [caption.token_ids for caption in found]
    assert len(set(tokens)) > 5
    assert len({len(ids) for ids in tokens}) > 2
    assert any(ids[-1] == STOP for ids in tokens)
    greedy = generate(make("mlp", seed=3), embeddings(8), DecodingOptions(num_beams=1, max_new_tokens=20))
    assert [caption.token_ids for caption in greedy] != tokens
    assert all(STOP not in ids[:-1] for ids in tokens)


class Scripted:
    """Stands for GPT-2: the next token's probabilities by the tokens so far."""

    def __init__(self, table: dict[tuple[int, ...], list[float]], otherwise: list[float]) -> None:
        self.table, self.otherwise, self.rows = table, otherwise, [()]
        self._look()

    def _look(self) -> None:
        self.logits = torch.tensor([self.table.get(row, self.otherwise) for row in self.rows]).log()

    def step(self, parents: torch.Tensor, tokens: torch.Tensor) -> None:
        pairs = zip(parents.tolist(), tokens.tolist(), strict=True)
        self.rows = [(*self.rows[parent], token) for parent, token in pairs]
        self._look()


def test_a_finished_hypothesis_takes_one_place_only():
    # [7] is finished at once; [0, 1] is unlikely at first and sure later. What would follow [7] must not push it out.
    rare = 1e-9
    table = {
        (): [0.3, *[0.2 / 6] * 6, 0.5],
        (0,): [0.12, 0.16, *[0.12] * 6],
        (7,): [0.5, 0.5, *[rare] * 6],
    }
    otherwise = [rare, 1.0, *[rare] * 6]
    found = _beam_search(Scripted(table, otherwise), 2, 10, 7)[0]
    assert found.token_ids == (0, *[1] * 9)
    assert found.score == pytest.approx((np.log(0.3) + np.log(0.16)) / 10, abs=1e-4)
    assert _beam_search(Scripted(table, otherwise), 2, 2, 7)[0].token_ids == (7,)


def test_the_company_of_an_image_changes_nothing():
    model, images = make(seed=3), embeddings(8)
    for options in (DEFAULTS_SHORT, DecodingOptions(do_sample=True, top_p=0.8, seed=4, max_new_tokens=12)):
        together = generate(model, images, options)
        alone = [generate(model, images[i : i + 1], options, keys=[i])[0] for i in range(8)]
        assert [caption.token_ids for caption in together] == [caption.token_ids for caption in alone]


DEFAULTS_SHORT = DecodingOptions(num_beams=5, max_new_tokens=20)


def test_sampling_draws_from_the_nucleus_by_seed_and_key():
    model, images = make(seed=3), embeddings(6)
    options = DecodingOptions(do_sample=True, top_p=0.8, temperature=1.5, seed=11, max_new_tokens=10)
    keys = [5, 2**63, 7, 0, 1, 2]
    found = generate(model, images, options, keys=keys)
    for caption, image, key in zip(found, images, keys, strict=True):
        prefix, tokens, total = model.prefix(image[None]), [], 0.0
        while len(tokens) < 10 and (not tokens or tokens[-1] != STOP):
            logits = next_logits(model, prefix, tokens)
            tokens.append(draw(logits.numpy(), options, key=key, position=len(tokens)))
            total += float(logits.log_softmax(0)[tokens[-1]])
        assert list(caption.token_ids) == tokens
        assert caption.score == pytest.approx(total / len(tokens), abs=1e-4)
    again = generate(model, images, options, keys=keys)
    other = generate(
        model, images, DecodingOptions(do_sample=True, top_p=0.8, temperature=1.5, seed=12, max_new_tokens=10)
    )
    assert again == found
    assert other != found


def test_sampling_is_not_the_arg_max():
    model, image = make(seed=3), embeddings(1)
    options = DecodingOptions(do_sample=True, top_p=0.95, temperature=2.0, max_new_tokens=1)
    first = [generate(model, image, options, keys=[key])[0].token_ids[0] for key in range(300)]
    logits = next_logits(model, model.prefix(image), []).double() / 2
    probabilities = logits.softmax(0)
    order = probabilities.argsort(descending=True)
    kept = order[: int((probabilities[order].cumsum(0) < 0.95).sum()) + 1]
    assert set(first) <= set(kept.tolist())
    expected = probabilities[kept] / probabilities[kept].sum()
    counts = torch.tensor([first.count(token) for token in kept.tolist()])
    assert (counts / 300 - expected).abs().max() < 0.1


def test_generation_leaves_the_model_in_its_mode():
    model = make(seed=3).train()
    first, second = (generate(model, embeddings(2), DEFAULTS_SHORT) for _ in range(2))
    assert first == second
    assert model.training
    assert generate(model, embeddings(2)[:0], DEFAULTS_SHORT) == []
    assert (DEFAULTS.num_beams, DEFAULTS.max_new_tokens) == (5, 67)


def test_options_without_a_counterpart_are_refused():
    model, images = make(), embeddings(2)
    with pytest.raises(OptionError) as error:
        generate(
            model,
            images,
            DecodingOptions(num_beams=50, max_new_tokens=37, length_penalty=2.0, repetition_penalty=1.5),
            keys=[1],
        )
    for words in ("length_penalty", "repetition_penalty", "room for 36", "50", "1 keys for 2 images"):
        assert words in str(error.value)
