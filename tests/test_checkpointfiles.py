"""Checkpoints from strangers: no code beside them is run, and their files are judged before transformers opens them."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
from pathlib import Path

import pytest

pytest.importorskip("transformers")

import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from rsedge.checkpointfiles import folder_problems
from rsedge.errors import CheckpointError, OptionError, RsedgeError
from rsedge.export.convert import export
from rsedge.export.loading import load_checkpoint
from rsedge.training.models.loading import load_pretrained, open_tokenizer
from rsedge.training.recipe import ModelRecipe
from tests.models import make_blip

WEIGHTS = "model.safetensors"
MODULE = """
import os
from pathlib import Path
Path(os.environ["PAYLOAD_TARGET"]).touch()
from transformers import BlipConfig, BlipForConditionalGeneration, BertTokenizer, BlipImageProcessor
class Config(BlipConfig): pass
class Model(BlipForConditionalGeneration): pass
class Tokenizer(BertTokenizer): pass
class Processor(BlipImageProcessor): pass
"""


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_blip(tmp_path_factory.mktemp("checkpoint") / "blip", layers=1, hidden=16, text_hidden=24, vocab=150)


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "blip"))


@pytest.fixture
def target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PAYLOAD_TARGET", str(tmp_path / "executed"))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    return tmp_path / "executed"


def edit(path: Path, **changes: object) -> None:
    values = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**values, **changes}))


def with_code(folder: Path) -> Path:
    """A module beside the weights, and every configuration that can name it does."""
    (folder / "payload.py").write_text(MODULE)
    edit(
        folder / "config.json",
        auto_map={
            "AutoConfig": "payload.Config",
            "AutoModel": "payload.Model",
            "AutoModelForVision2Seq": "payload.Model",
        },
        trust_remote_code=True,
    )
    edit(
        folder / "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["payload.Tokenizer", "payload.Tokenizer"]},
        trust_remote_code=True,
    )
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (folder / name).exists():
            edit(
                folder / name,
                auto_map={"AutoImageProcessor": "payload.Processor", "AutoProcessor": "payload.Processor"},
            )
    edit(folder / "generation_config.json", custom_generate="payload", trust_remote_code=True)
    (folder / "custom_generate").mkdir(exist_ok=True)
    (folder / "custom_generate" / "generate.py").write_text(MODULE)
    return folder


def hub_layout(folder: Path, home: Path) -> str:
    """The folder as the hub's cache has it; returns its id."""
    store = home / "hub" / "models--stranger--blip"
    shutil.copytree(folder, store / "snapshots" / ("0" * 40))
    (store / "refs").mkdir()
    (store / "refs" / "main").write_text("0" * 40)
    return "stranger/blip"


def test_the_payload_is_one(folder: Path, target: Path):
    """The control: where code is trusted, it runs."""
    with_code(folder)
    AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert target.exists()


def test_code_beside_a_checkpoint_is_not_run_by_export(folder: Path, target: Path, tmp_path: Path):
    assert export(with_code(folder), tmp_path / "x.rsedge").manifest.family == "blip"
    assert not target.exists()


def test_code_beside_a_checkpoint_is_not_run_by_training(folder: Path, target: Path):
    from transformers import BlipForConditionalGeneration

    from rsedge.training.models.loading import config_type, image_spec

    with_code(folder)
    assert load_pretrained(BlipForConditionalGeneration, ModelRecipe(init=str(folder))) is not None
    assert open_tokenizer(folder) is not None
    assert (config_type(str(folder)), image_spec(str(folder)).size) == ("blip", 32)
    assert not target.exists()


@pytest.mark.parametrize(
    ("section", "changes", "says"),
    [
        ("vision_config", {"patch_size": 0}, "by zero"),
        ("text_config", {"num_attention_heads": 0}, "by zero"),
        ("text_config", {"hidden_size": "x"}, "hidden_size"),
        ("text_config", {"hidden_act": "x"}, "x"),
        # Of these it would make tensors by the hour, and some GB of them, before it compares them with the file.
        ("text_config", {"num_hidden_layers": 200_000}, "at most 1000"),
        ("text_config", {"vocab_size": 20_000_000}, "asks for .* weights"),
    ],
)
def test_settings_that_make_no_model_are_an_error_of_the_checkpoint(folder, section, changes, says):
    from transformers import BlipForConditionalGeneration

    config = json.loads((folder / "config.json").read_text())
    edit(folder / "config.json", **{section: {**config[section], **changes}})
    with pytest.raises(OptionError, match=says):
        load_pretrained(BlipForConditionalGeneration, ModelRecipe(init=str(folder)))


@pytest.mark.parametrize("name", ["recipe.toml", "vocab.txt", "special_tokens_map.json", WEIGHTS])
def test_a_link_out_of_a_checkpoint_is_refused(folder: Path, tmp_path: Path, name: str):
    """Its text would be in the bundle, which is passed on: of the recipe as provenance, of a vocabulary as tokens."""
    from transformers import BlipForConditionalGeneration

    outside = tmp_path / "outside"
    if (folder / name).exists():
        (folder / name).rename(outside)
    else:
        outside.write_text('token = "a secret of the user"')
    (folder / name).symlink_to(outside)
    with pytest.raises(CheckpointError, match=f"{re.escape(name)} is a link that leads outside"):
        export(folder, tmp_path / "x.rsedge")
    with pytest.raises(OptionError, match=f"{re.escape(name)} is a link that leads outside"):
        load_pretrained(BlipForConditionalGeneration, ModelRecipe(init=str(folder)))


def test_a_recipe_that_is_a_pipe_is_not_waited_for(folder: Path, tmp_path: Path):
    os.mkfifo(folder / "recipe.toml")
    assert export(folder, tmp_path / "x.rsedge").manifest.provenance.recipe is None


@pytest.mark.parametrize("text", ["[]", "[" * 100_000, "no JSON"])
def test_a_configuration_that_is_none_is_an_error_of_the_checkpoint(folder: Path, text: str):
    from rsedge.evaluation.checkpoints import open_checkpoint_captioner

    (folder / "config.json").write_text(text)
    with pytest.raises(OptionError, match=r"config\.json"):
        open_checkpoint_captioner(str(folder), "stranger", "cpu", 1, {})


def test_a_tokenizer_that_breaks_its_package_is_an_error_of_the_checkpoint(folder: Path, tmp_path: Path):
    merged = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"], "continuing_subword_prefix": "##"}
    edit(folder / "tokenizer.json", model=merged)
    edit(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")  # which takes the file as it is
    with pytest.raises(CheckpointError, match="tokenizer"):
        export(folder, tmp_path / "x.rsedge")
    with pytest.raises(OptionError, match="there is no tokenizer"):
        open_tokenizer(folder)
    edit(folder / "tokenizer_config.json", tokenizer_class={"a": 1})
    with pytest.raises(OptionError, match="there is no tokenizer"):
        open_tokenizer(folder)


def test_a_tokenizer_that_fails_at_texts_is_not_exported(folder: Path, tmp_path: Path):
    edit(folder / "tokenizer.json", model={"type": "BPE", "vocab": {"a": 0}, "merges": []})
    with pytest.raises(CheckpointError, match="tokenizer"):
        export(folder, tmp_path / "x.rsedge")


def test_code_beside_a_checkpoint_is_not_run_by_evaluation(folder: Path, target: Path):
    from rsedge.evaluation.checkpoints import open_checkpoint_captioner

    assert open_checkpoint_captioner(str(with_code(folder)), "stranger", "cpu", 1, {}) is not None
    assert not target.exists()


def test_code_in_the_hubs_cache_is_not_run_either(folder: Path, target: Path, tmp_path: Path):
    """In a process of its own: the place of the cache is read at import."""
    import subprocess
    import sys

    name = hub_layout(with_code(folder), tmp_path / "home")
    script = f"""
from transformers import BlipForConditionalGeneration
from rsedge.export.loading import load_checkpoint
from rsedge.export.tokenizer import export_tokenizer
from rsedge.training.models.loading import load_pretrained
from rsedge.training.recipe import ModelRecipe
from rsedge.training.models.loading import open_tokenizer
from pathlib import Path
checkpoint = load_checkpoint({name!r})
export_tokenizer(checkpoint.path, Path({str(tmp_path / "tokenizer.json")!r}))
load_pretrained(BlipForConditionalGeneration, ModelRecipe(init={name!r}))
open_tokenizer({name!r})
"""
    env = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert not target.exists()


def refused(folder: Path, words: str, *, by_export: bool = True) -> None:
    """Export, training and their tokenizers refuse a folder, and say why."""
    from transformers import BlipForConditionalGeneration

    with pytest.raises(OptionError) as training:
        load_pretrained(BlipForConditionalGeneration, ModelRecipe(init=str(folder)))
    assert words in str(training.value)
    with pytest.raises(OptionError):
        open_tokenizer(folder)
    if by_export:
        with pytest.raises(CheckpointError) as exporting:
            load_checkpoint(folder)
        assert words in str(exporting.value)


@pytest.mark.parametrize("name", ["attn_implementation", "_attn_implementation", "_attn_implementation_internal"])
@pytest.mark.parametrize("place", ["top", "section", "by section"])
def test_a_kernel_of_the_hub_is_not_fetched(folder: Path, name: str, place: str):
    config = folder / "config.json"
    if place == "section":
        edit(config, vision_config={**json.loads(config.read_text())["vision_config"], name: "stranger/kernel"})
    else:
        edit(config, **{name: "stranger/kernel" if place == "top" else {"vision_config": "stranger/kernel"}})
    refused(folder, "which rsedge never runs")


def test_an_adapter_and_quantized_weights_are_refused(folder: Path):
    edit(folder / "adapter_config.json", base_model_name_or_path="stranger/other", peft_type="LORA")
    refused(folder, "an adapter of another model")
    (folder / "adapter_config.json").unlink()
    edit(folder / "config.json", quantization_config={"quant_method": "bitsandbytes"})
    refused(folder, "which rsedge cannot read")


def test_a_slow_tokenizer_is_refused(folder: Path):
    values = json.loads((folder / "tokenizer.json").read_text())
    values["pre_tokenizer"] = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    (folder / "tokenizer.json").write_text(json.dumps(values))
    refused(folder, "the regular expression '(a+)+$'")
    with pytest.raises(OptionError, match="regular expression"):
        open_tokenizer(folder)


@pytest.mark.parametrize("name", ["vocab.txt", "merges.txt", "config.json"])
def test_files_are_judged_by_size_first(folder: Path, name: str):
    (folder / name).touch()
    os.truncate(folder / name, 65 << 20)  # a hole: it takes no room
    refused(folder, "at most 67108864 are read")


def test_a_pipe_is_not_waited_for(folder: Path):
    (folder / "tokenizer.json").unlink()
    os.mkfifo(folder / "tokenizer.json")
    refused(folder, "tokenizer.json is no file", by_export=False)
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        load_checkpoint(folder)


class Command:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("place", ["pytorch_model.bin", "shard.bin", "../shard.bin"])
def test_pickled_weights_are_never_opened(folder: Path, target: Path, place: str):
    names = list(load_file(folder / WEIGHTS))
    (folder / WEIGHTS).unlink()
    torch.save({name: Command(target) for name in names}, folder / place)
    if place != "pytorch_model.bin":
        edit(folder / f"{WEIGHTS}.index.json", metadata={}, weight_map=dict.fromkeys(names, place))
    from transformers import BlipForConditionalGeneration

    with pytest.raises(RsedgeError):
        load_pretrained(BlipForConditionalGeneration, ModelRecipe(init=str(folder)))
    with pytest.raises(CheckpointError):
        load_checkpoint(folder)
    assert not target.exists()
    torch.load(folder / place, weights_only=False)
    assert target.exists(), "the control: it is a payload"


def header(**tensors: object) -> bytes:
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text


def entry(shape: object, begin: object, stop: object, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, stop]}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (struct.pack("<Q", 2**63), "its header needs"),
        (struct.pack("<Q", 50 << 20) + b"{" + bytes(60 << 20), "at most 10485760 are read"),
        (struct.pack("<Q", 4) + b"{}", "its header needs"),
        (b"123", "its header needs"),
        (header(a=entry([2], 0, 8), b=entry([2], 4, 12)) + bytes(12), "overlap or leave gaps"),
        (header(a=entry([2], 0, 8), b=entry([2], 0, 8)) + bytes(8), "overlap or leave gaps"),
        (header(a=entry([2], 4, 12)) + bytes(12), "overlap or leave gaps"),
        (header(a=entry([2], 0, 8)) + bytes(4), "cut short"),
        (header(a=entry([2], 0, 8)) + bytes(12), "damaged"),
        (header(a=entry([3], 0, 8)) + bytes(8), "cannot hold F32 [3]"),
        (header(a=entry([-2, -1], 0, 8)) + bytes(8), "cannot hold"),
        (header(a=entry([2**62, 4], 0, 8)) + bytes(8), "impossible"),
        (header(a=entry([1] * 10**5, 0, 4)) + bytes(4), "impossible"),
        (header(a=entry([2.0], 0, 8)) + bytes(8), "impossible"),
        (header(a=entry([True], 0, 4)) + bytes(4), "impossible"),
        (header(a=entry(["2"], 0, 8)) + bytes(8), "impossible"),
        (header(a=entry([2], 8, 0)) + bytes(8), "cannot hold"),
        (struct.pack("<Q", 200_000) + b"[" * 200_000, "damaged"),
    ],
)
def test_headers_that_do_not_fit_the_file_are_refused(folder: Path, content: bytes, words: str):
    from transformers import BlipForConditionalGeneration

    (folder / WEIGHTS).write_bytes(content)
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(folder)
    assert words in str(error.value)
    assert len(str(error.value)) < 2000
    with pytest.raises(OptionError):  # by safetensors' own reader, behind the limit of the header
        load_pretrained(BlipForConditionalGeneration, ModelRecipe(init=str(folder)))


def test_a_sound_checkpoint_has_no_problems(folder: Path):
    assert folder_problems(folder) == []
