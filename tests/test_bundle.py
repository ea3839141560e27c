"""The bundle on disk: what is written is what is read, and nothing else is trusted."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import rsedge.bundle as bundle_module
from rsedge.bundle import (
    Bundle,
    DecoderSpec,
    GenerationDefaults,
    ImageSpec,
    Manifest,
    Provenance,
    TensorSpec,
    TokenSpec,
    cache_dir,
    describe_file,
    describe_graph,
    read_bundle,
    write_bundle,
)
from rsedge.errors import BundleError, OptionError, OutputError
from rsedge.graphcheck import external_locations

TOKENIZER = '{"model": {"type": "WordPiece", "vocab": {"a": 0}}}'


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RSEDGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def save_onnx(path: Path, *, external: str | None = None) -> None:
    weight = numpy_helper.from_array(np.arange(16, dtype=np.float32).reshape(4, 4), "w")
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", ends[:1], ends[1:], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    options = {"save_as_external_data": True, "location": external, "size_threshold": 0} if external else {}
    onnx.save(model, str(path), **options)


def build(folder: Path, *, name: str = "tiny", external: str | None = "vision.onnx.data") -> Manifest:
    save_onnx(folder / "vision.onnx", external=external)
    (folder / "tokenizer.json").write_text(TOKENIZER)
    (folder / "README.md").write_text("card")
    return Manifest(
        name=name,
        family="blip",
        precision="fp32",
        graphs={
            "vision": describe_graph(
                folder,
                "vision.onnx",
                opset=20,
                inputs=[TensorSpec(name="x", dtype="float32", shape=("batch", 4))],
                outputs=[TensorSpec(name="y", dtype="float32", shape=("batch", 4))],
            )
        },
        image=ImageSpec(size=32, mean=(0.5, 0.5, 0.5), std=(1, 1, 1), reflectance={"full_scale": 2500}),
        tokens=TokenSpec(bos=1, eos=2, pad=0, vocab_size=3),
        generation=GenerationDefaults(max_new_tokens=20, early_stopping="never"),
        decoder=DecoderSpec(layers=1, heads=2, head_dim=4, max_positions=64, image_tokens=17),
        tokenizer=describe_file(folder, "tokenizer.json"),
        provenance=Provenance(
            source="run/é",
            source_sha256="0" * 64,
            exported_at="2026-01-02T03:04:05Z",
            versions={"onnx": onnx.__version__},
        ),
        parity={"fp32": {"max_error": 1e-6}},
    )


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return write_bundle(tmp_path / "tiny.rsedge", build)


def edit(bundle: Bundle, change) -> None:
    path = bundle.path / "manifest.json"
    values = json.loads(path.read_bytes())
    change(values)
    path.write_text(json.dumps(values))


# Round trip


def test_what_is_written_is_what_is_read(bundle: Bundle):
    found = read_bundle(bundle.path)
    assert found == bundle
    assert found.manifest.image.std == (1.0, 1.0, 1.0)
    assert found.manifest.generation is not None
    assert found.manifest.generation.early_stopping == "never"
    assert found.graph_path("vision") == bundle.path / "vision.onnx"
    assert found.tokenizer_path.read_text() == TOKENIZER


def test_the_hash_is_what_sha256sum_prints_for_the_manifest(bundle: Bundle):
    printed = subprocess.run(
        ["sha256sum", str(bundle.path / "manifest.json")], capture_output=True, text=True, check=True
    ).stdout
    assert bundle.hash == printed.split()[0]
    assert bundle.model == f"tiny@{bundle.hash[:12]}"


def test_equal_content_gives_equal_bytes(bundle: Bundle, tmp_path: Path):
    assert write_bundle(tmp_path / "again.rsedge", build).hash == bundle.hash


def test_an_unknown_graph_is_named_with_those_there_are(bundle: Bundle):
    with pytest.raises(BundleError, match="no graph 'step'; it has vision"):
        bundle.graph_path("step")


def test_reading_imports_neither_numpy_nor_onnx(bundle: Bundle):
    code = (
        "import sys, rsedge.bundle as b; b.read_bundle(sys.argv[1]); "
        "assert not {'numpy', 'onnx', 'torch', 'click'} & set(sys.modules), sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(bundle.path)], check=True)


# Value classes


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TokenSpec(bos=3, eos=-1, pad=0, vocab_size=3), "bos must be in 0 to 2, got 3; eos .* got -1"),
        (lambda: ImageSpec(size=0, mean=(0, 0, 0), std=(1, 1, 1)), "size must be positive, got 0"),
        (lambda: ImageSpec(size=8, mean=(0,), std=(1, 1, 0)), r"mean must have one value per band \(3\).*std must"),
        (lambda: GenerationDefaults(max_new_tokens=5, min_new_tokens=6), r"is 6, expected 0 to max_new_tokens \(5\)"),
        (lambda: GenerationDefaults(max_new_tokens=5, top_p=0), "top_p is 0, expected a share above 0 and at most 1"),
        (lambda: TensorSpec(name="x", dtype="int64", shape=("a b",)), "positive sizes or names like 'batch'"),
        (lambda: DecoderSpec(layers=0, heads=1, head_dim=1, max_positions=1, image_tokens=1), "decoder layers must be"),
        (
            lambda: Provenance(source="s", source_sha256="0" * 64, exported_at="2026-13-01T00:00:00Z", versions={}),
            "RFC 3339",
        ),
    ],
)
def test_impossible_values_are_refused(make, message: str):
    with pytest.raises(BundleError, match=message):
        make()


# The last two: what ONNX Runtime takes for an address of memory, and a name that ends a line of an error.
ODD_FILES = ["-x.onnx", ".hidden/x.onnx", "x" * 201, "*/_ORT_MEM_ADDR_/*", "x\ny.onnx"]


@pytest.mark.parametrize(
    "file", ["/etc/passwd", "../x.onnx", "a/../x.onnx", "./x.onnx", "a//x.onnx", "a\\x.onnx", ".", *ODD_FILES]
)
def test_paths_out_of_the_bundle_are_refused(file: str):
    with pytest.raises(BundleError, match="plain relative path inside the bundle"):
        bundle_module.FileRef(file=file, sha256="0" * 64, size=1)


def test_a_captioner_needs_its_decoder_parts(tmp_path: Path):
    manifest = build(tmp_path)
    with pytest.raises(BundleError, match=r"needs 'tokens'.*needs 'decoder'"):
        dataclasses.replace(manifest, tokens=None, decoder=None)


# Refusals


def test_everything_wrong_with_a_manifest_is_told_at_once(bundle: Bundle):
    def spoil(values):
        values["surprise"] = 1
        values["image"]["size"] = "large"
        values["image"]["mean"] = [0, "x", 0]
        values["generation"]["early_stopping"] = "sometimes"
        values["graphs"]["vision"]["opset"] = True
        values["graphs"]["vision"]["inputs"][0]["dtype"] = "complex"
        values["decoder"]["layers"] = 0
        del values["provenance"]["source"]

    edit(bundle, spoil)
    with pytest.raises(BundleError) as caught:
        read_bundle(bundle.path)
    text = str(caught.value)
    for expected in (
        "surprise is not a field rsedge knows",
        'image.size must be a whole number, got "large"',
        'image.mean[1] must be a number, got "x"',
        'generation.early_stopping must be true or false or "never", got "sometimes"',
        "graphs.vision.opset must be a whole number, got true",
        'graphs.vision.inputs[0].dtype must be "float32" | ',
        "decoder: decoder layers must be positive, got 0",
        "provenance.source is missing",
    ):
        assert expected in text


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        ("image.size", 10**9, "image size must be at most 4096"),
        ("image.mean", [1e300, 0, 0], "mean and std must be numbers up to 1e+06"),
        ("image.bands", ["x" * 10**5, "g", "b"], "a band's name must have at most 200 characters"),
        ("image.bands", ["b"] * 10**5, "and at most 100"),
        ("tokens.vocab_size", 2**60, "vocab_size must be in 1 to 4194304"),
        ("generation.max_new_tokens", 2**40, "expected 1 to 131072"),
        ("decoder.layers", 10**6, "decoder layers must be at most 1000"),
        ("decoder.heads", 10**6, "decoder heads must be at most 1000"),
        ("decoder.head_dim", 10**9, "decoder head_dim must be at most"),
        ("decoder.image_tokens", 10**9, "decoder image_tokens must be at most"),
        (
            "decoder",
            {"layers": 900, "heads": 900, "head_dim": 900, "max_positions": 9, "image_tokens": 9},
            "caches must",
        ),
        ("graphs.vision.size", 2**60, "size of 'vision.onnx' must be at most"),
        ("graphs.vision.opset", 10**6, "opset of 'vision.onnx' must be at most 100"),
        ("graphs.vision.inputs", [{"name": "x", "dtype": "int8", "shape": [1] * 9}], "must have at most 8 axes"),
        (
            "graphs.vision.inputs",
            [{"name": "x", "dtype": "int8", "shape": [2**24] * 3}],
            "sizes up to 16777216, together",
        ),
        ("graphs.vision.inputs", [{"name": "x" * 999, "dtype": "int8", "shape": [1]}], "name must have at most 200"),
        (
            "graphs.vision.outputs",
            [{"name": f"y{i}", "dtype": "int8", "shape": [1]} for i in range(5000)],
            "at most 4096 inputs, outputs and files",
        ),
        ("provenance.versions", {str(i): "1" for i in range(200)}, "at most 100 versions"),
        ("provenance.source", "x" * 10**5, "provenance.source must have at most 4096 characters"),
        ("parity", {"x": list(range(300_000))}, "values, at most 200000 are read"),
    ],
)
def test_numbers_and_texts_without_bound_are_refused(bundle: Bundle, place: str, value, words: str):
    def spoil(values):
        *way, last = place.split(".")
        for name in way:
            values = values[name]
        values[last] = value

    edit(bundle, spoil)
    with pytest.raises(BundleError, match=re.escape(words)) as caught:
        read_bundle(bundle.path)
    assert len(str(caught.value)) < 3000


@pytest.mark.parametrize("role", ["../x", "", "Vision", "x" * 51, "a b"])
def test_graphs_have_plain_names(bundle: Bundle, role: str):
    edit(bundle, lambda values: values["graphs"].update({role: values["graphs"]["vision"]}))
    with pytest.raises(BundleError, match="graphs must have names of 1 to 50 small letters"):
        read_bundle(bundle.path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 100_000, "nests deeper than 32"),
        ('{"a":' * 500 + "1" + "}" * 500, "nests deeper than 32"),
        ('{"a": ' + "9" * 5000 + "}", "is not a JSON number"),
        ('{"a": 1e999}', "1e999 is not a JSON number"),
        ('{"a": -Infinity}', "-Infinity is not a JSON number"),
        (" " * (5 << 20), "has more than 4194304 bytes"),
        ("[],[" * 100_000, "about 300000 values"),
    ],
)
def test_a_manifest_that_would_take_the_memory_is_refused(bundle: Bundle, text: str, words: str):
    (bundle.path / "manifest.json").write_text(text)
    with pytest.raises(BundleError, match=re.escape(words)):
        read_bundle(bundle.path)


def test_a_pipe_for_a_manifest_is_not_waited_for(bundle: Bundle):
    (bundle.path / "manifest.json").unlink()
    os.mkfifo(bundle.path / "manifest.json")
    with pytest.raises(BundleError, match=r"holds no manifest\.json"):
        read_bundle(bundle.path)


def test_a_hard_link_is_read_if_it_holds_what_the_manifest_says(bundle: Bundle, tmp_path: Path):
    """Package managers install files as hard links; what one leads to is pinned by its hash."""
    weights = bundle.path / "vision.onnx.data"
    (tmp_path / "store").hardlink_to(weights)
    assert weights.stat().st_nlink == 2
    assert read_bundle(bundle.path) == bundle
    secret = tmp_path / "secret"
    secret.write_bytes(b"s" * weights.stat().st_size)
    weights.unlink()
    weights.hardlink_to(secret)
    with pytest.raises(BundleError, match=r"vision.onnx.data is altered"):
        read_bundle(bundle.path)


@pytest.mark.parametrize("version", [0, 2, "1", None, True, 1.0])
def test_another_format_version_is_refused_and_nothing_else_is_said(bundle: Bundle, version):
    edit(bundle, lambda values: values.update(format_version=version, unknown=1))
    with pytest.raises(BundleError, match="this rsedge reads 1: export the checkpoint again") as caught:
        read_bundle(bundle.path)
    assert "unknown" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff", '{"format_version": NaN}'])
def test_a_manifest_that_is_no_json_object_is_refused(bundle: Bundle, text: str):
    (bundle.path / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(BundleError, match=r"manifest.json (is not JSON|must hold)"):
        read_bundle(bundle.path)


def test_missing_short_and_altered_files_are_told_at_once(bundle: Bundle):
    graph, data, tokenizer = (bundle.path / name for name in ("vision.onnx", "vision.onnx.data", "tokenizer.json"))
    content = bytearray(graph.read_bytes())
    content[-1] ^= 1
    graph.write_bytes(content)
    data.write_bytes(data.read_bytes()[:10])
    tokenizer.unlink()
    with pytest.raises(BundleError) as caught:
        read_bundle(bundle.path)
    text = str(caught.value)
    assert f"vision.onnx is altered: expected sha256 {bundle.manifest.graphs['vision'].sha256}, found " in text
    assert "vision.onnx.data is cut short: expected 64 bytes, found 10" in text
    assert "tokenizer.json is missing" in text


def test_links_out_of_the_bundle_are_refused_and_links_within_are_not(bundle: Bundle, tmp_path: Path):
    tokenizer = bundle.path / "tokenizer.json"
    tokenizer.rename(bundle.path / "real.json")
    tokenizer.symlink_to("real.json")
    assert read_bundle(bundle.path).manifest == bundle.manifest
    (bundle.path / "real.json").rename(tmp_path / "outside.json")
    tokenizer.unlink()
    tokenizer.symlink_to(tmp_path / "outside.json")
    with pytest.raises(BundleError, match=r"tokenizer.json is a link that leads outside the bundle .*cp -rL"):
        read_bundle(bundle.path)


def test_a_manifest_linked_from_outside_is_refused(bundle: Bundle, tmp_path: Path):
    (bundle.path / "manifest.json").rename(tmp_path / "manifest.json")
    (bundle.path / "manifest.json").symlink_to(tmp_path / "manifest.json")
    with pytest.raises(BundleError, match=r"manifest.json is a link that leads outside"):
        read_bundle(bundle.path)


def test_a_bundle_reached_through_a_link_is_read(bundle: Bundle, tmp_path: Path):
    (tmp_path / "latest").symlink_to(bundle.path)
    assert read_bundle(tmp_path / "latest") == bundle


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "does not exist; make one with 'rsedge export"),
        (lambda path: path.write_text(""), "it is a file"),
        (lambda path: path.mkdir(), r"holds no manifest\.json"),
        (lambda path: (path.mkdir(), (path / "config.json").touch()), "it is a checkpoint; export it first"),
    ],
)
def test_what_is_no_bundle_is_said(tmp_path: Path, make, message: str):
    make(tmp_path / "model")
    with pytest.raises(BundleError, match=message):
        read_bundle(tmp_path / "model")


# External data


def relist(bundle: Bundle, file: str = "vision.onnx") -> None:
    """Make the manifest vouch for the graph as it is now, as the author of a hostile bundle would."""
    ref = describe_file(bundle.path, file)
    edit(bundle, lambda values: values["graphs"]["vision"].update(sha256=ref.sha256, size=ref.size))


@pytest.mark.parametrize(
    "location", ["../secret", "/etc/passwd", "./vision.onnx.data", "other.data", "a/../vision.onnx.data"]
)
def test_external_data_the_manifest_does_not_list_is_refused(bundle: Bundle, location: str):
    model = onnx.load(str(bundle.path / "vision.onnx"), load_external_data=False)
    entry = next(item for item in model.graph.initializer[0].external_data if item.key == "location")
    entry.value = location
    (bundle.path / "vision.onnx").write_bytes(model.SerializeToString())
    relist(bundle)
    with pytest.raises(BundleError, match="which the manifest does not list") as caught:
        read_bundle(bundle.path)
    assert repr(location) in str(caught.value)


@pytest.mark.parametrize("kind", ["symbolic link", "hard link", "listed"])
def test_external_data_outside_is_not_read_by_any_link(bundle: Bundle, tmp_path: Path, kind: str):
    data, secret = bundle.path / "vision.onnx.data", tmp_path / "secret"
    secret.write_bytes(b"s" * data.stat().st_size)
    data.unlink()
    if kind == "symbolic link":
        data.symlink_to(secret)
    elif kind == "hard link":
        data.hardlink_to(secret)
    else:
        ref = {**dataclasses.asdict(bundle.manifest.graphs["vision"].external_data[0]), "file": "../secret"}
        edit(bundle, lambda values: values["graphs"]["vision"].update(external_data=[ref]))
    with pytest.raises(BundleError, match=r"leads outside the bundle|is altered|plain relative path inside the bundle"):
        read_bundle(bundle.path)


def test_a_hostile_graph_or_tokenizer_that_the_manifest_vouches_for_is_refused(bundle: Bundle):
    model = onnx.load(str(bundle.path / "vision.onnx"), load_external_data=False)
    model.graph.node[0].op_type = "EPContext"
    (bundle.path / "vision.onnx").write_bytes(model.SerializeToString())
    (bundle.path / "tokenizer.json").write_text(
        '{"model": {"type": "WordPiece", "vocab": {}}, "padding": {"pad": 1e9}}'
    )
    relist(bundle)
    ref = dataclasses.asdict(describe_file(bundle.path, "tokenizer.json"))
    edit(bundle, lambda values: values.update(tokenizer=ref))
    for _ in range(2):  # a verdict is remembered only if it is good
        with pytest.raises(BundleError) as caught:
            read_bundle(bundle.path)
        assert "vision.onnx has the operator 'EPContext', which rsedge never writes: do not use" in str(caught.value)
        assert "tokenizer.json has the number 1000000000.0 in its padding: do not use" in str(caught.value)


def test_external_data_beside_a_graph_in_a_folder_is_found(tmp_path: Path):
    def nested(folder: Path) -> Manifest:
        (folder / "graphs").mkdir()
        manifest = build(folder, external=None)
        save_onnx(folder / "graphs" / "vision.onnx", external="w.data")
        graph = describe_graph(
            folder,
            "graphs/vision.onnx",
            opset=20,
            inputs=manifest.graphs["vision"].inputs,
            outputs=manifest.graphs["vision"].outputs,
        )
        return dataclasses.replace(manifest, graphs={"vision": graph})

    written = write_bundle(tmp_path / "nested.rsedge", nested)
    assert [ref.file for ref in written.manifest.graphs["vision"].external_data] == ["graphs/w.data"]
    assert read_bundle(written.path) == written


def tensor_elsewhere(location: str) -> TensorProto:
    tensor = TensorProto(name=location, data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="offset", value="0")
    tensor.external_data.add(key="location", value=location)
    return tensor


@pytest.mark.parametrize("place", ["subgraph", "sparse", "attribute", "attributes", "function", "training"])
def test_where_onnx_can_hide_external_data_nothing_may_be(tmp_path: Path, place: str):
    tensor = tensor_elsewhere("hidden")
    inner = helper.make_graph([], "inner", [], [], [tensor])
    attributes = {"subgraph": {"g": inner}, "attribute": {"t": tensor}, "attributes": {"many": [tensor]}}.get(place, {})
    sparse = [onnx.SparseTensorProto(values=tensor, indices=tensor)] if place == "sparse" else []
    graph = helper.make_graph([helper.make_node("If", [], [], **attributes)], "g", [], [], sparse_initializer=sparse)
    model = helper.make_model(graph)
    if place == "function":
        constant = helper.make_node("Constant", [], ["c"], value=tensor)
        model.functions.append(helper.make_function("d", "f", [], ["c"], [constant], [helper.make_opsetid("", 20)]))
    if place == "training":
        model.training_info.add(algorithm=inner)
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(BundleError, match=r"has the field .*, which rsedge never writes"):
        external_locations(path)


def test_a_second_value_cannot_hide_behind_the_first(tmp_path: Path):
    tensor = tensor_elsewhere("decoy")
    tensor.external_data.add(key="location", value="real")
    model = helper.make_model(helper.make_graph([], "g", [], [], [tensor]))
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(BundleError, match="gives 'location' of its external data twice"):
        external_locations(path)
    # Protobuf merges repeated occurrences of a message, so a file may also hold its graph in two pieces.
    model = helper.make_model(helper.make_graph([], "g", [], [], [tensor_elsewhere("first piece")]))
    more = onnx.ModelProto(graph=helper.make_graph([], "g", [], [], [tensor_elsewhere("second piece")]))
    path.write_bytes(model.SerializeToString() + more.SerializeToString())
    with pytest.raises(BundleError, match="its Model gives graph twice"):
        external_locations(path)


def field(number: int, content: bytes) -> bytes:
    """A length-delimited protobuf field, for files that no serialiser would write."""
    assert len(content) < 128
    return bytes([number << 3 | 2, len(content)]) + content


def test_a_value_given_twice_in_one_entry_is_refused(tmp_path: Path):
    entry = field(1, b"location") + field(2, b"decoy") + field(2, b"real")
    path = tmp_path / "model.onnx"
    path.write_bytes(field(7, field(5, field(13, entry))))
    (tensor,) = onnx.load(str(path), load_external_data=False).graph.initializer
    assert tensor.external_data[0].value == "real"  # what a loader would open
    with pytest.raises(BundleError, match="its Entry gives value twice"):
        external_locations(path)


def test_a_graph_without_external_data_has_no_locations(tmp_path: Path):
    save_onnx(tmp_path / "model.onnx")
    assert external_locations(tmp_path / "model.onnx") == frozenset()


def test_a_cut_onnx_file_never_passes_for_a_whole_one(tmp_path: Path):
    save_onnx(tmp_path / "model.onnx", external="w.data")
    whole = (tmp_path / "model.onnx").read_bytes()
    path = tmp_path / "cut.onnx"
    refused = 0
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        try:
            assert external_locations(path) == {"w.data"}  # cut between two fields of the model, after its graph
        except BundleError:
            refused += 1
    assert refused > 0.8 * len(whole)


@pytest.mark.parametrize(
    "content",
    [b":\x00\x09\x00", b"\x00", b"\x0b", b"\xff" * 20, b":\xff\xff\xff\xff\x0f", b"PK\x03\x04 not onnx", b"\x08\x08"],
)
def test_garbage_is_refused_as_onnx(tmp_path: Path, content: bytes):
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(BundleError, match="not a readable ONNX file"):
        external_locations(tmp_path / "model.onnx")


# The memory of what was checked


def count_hashes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    hashed: list[str] = []
    original = bundle_module.sha256_of

    def counting(path: Path) -> str:
        hashed.append(path.name)
        return original(path)

    monkeypatch.setattr(bundle_module, "sha256_of", counting)
    return hashed


def test_a_file_is_hashed_once_until_it_changes(bundle: Bundle, monkeypatch: pytest.MonkeyPatch):
    hashed = count_hashes(monkeypatch)
    read_bundle(bundle.path)
    assert sorted(hashed) == ["tokenizer.json", "vision.onnx", "vision.onnx.data"]
    hashed.clear()
    read_bundle(bundle.path)
    assert hashed == []
    (bundle.path / "tokenizer.json").write_text(TOKENIZER.replace("a", "b"))  # as long as before
    with pytest.raises(BundleError, match=r"tokenizer.json is altered"):
        read_bundle(bundle.path)
    assert hashed == ["tokenizer.json"]


def test_contents_are_checked_once_until_the_manifest_or_the_checks_change(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
):
    checked: list[str] = []
    monkeypatch.setattr(bundle_module, "graph_problems", lambda root, graph: checked.append(graph.file) or [])
    read_bundle(bundle.path)
    read_bundle(bundle.path)
    assert checked == ["vision.onnx"]
    edit(bundle, lambda values: values.update(name="other"))
    read_bundle(bundle.path)
    monkeypatch.setattr(bundle_module, "_CHECKS", bundle_module._CHECKS + 1)
    read_bundle(bundle.path)
    assert checked == ["vision.onnx"] * 3


def test_the_cache_is_private_and_follows_rsedge_cache(bundle: Bundle, cache: Path):
    read_bundle(bundle.path)
    assert cache_dir() == cache
    folder = cache / "verified"
    assert stat.S_IMODE(cache.stat().st_mode) == stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert [stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()] == [0o600]


def test_the_cache_defaults_to_the_home_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.delenv("RSEDGE_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "rsedge"


def test_a_cache_others_can_write_is_not_believed(bundle: Bundle, cache: Path, monkeypatch: pytest.MonkeyPatch):
    read_bundle(bundle.path)
    (cache / "verified").chmod(0o777)
    hashed = count_hashes(monkeypatch)
    read_bundle(bundle.path)
    assert len(hashed) == 3


@pytest.mark.parametrize("content", ["", "[]", '{"tokenizer.json": 1}'])
def test_a_damaged_cache_is_only_slow(bundle: Bundle, cache: Path, content: str):
    read_bundle(bundle.path)
    for file in (cache / "verified").iterdir():
        file.write_text(content)
    assert read_bundle(bundle.path) == bundle


def test_a_cache_that_cannot_be_written_is_no_error(bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("RSEDGE_CACHE", str(tmp_path / "file" / "below"))
    assert read_bundle(bundle.path) == bundle


# Writing


@pytest.mark.parametrize("name", ["model", "model.RSEDGE", ".rsedge", "model.rsedge.zip"])
def test_a_name_without_the_suffix_is_refused(tmp_path: Path, name: str):
    with pytest.raises(OptionError, match=r"must end in \.rsedge"):
        write_bundle(tmp_path / name, build)


def test_a_bundle_is_not_replaced_unless_asked(bundle: Bundle):
    with pytest.raises(OutputError, match="exists already"):
        write_bundle(bundle.path, build)
    assert read_bundle(bundle.path) == bundle


@pytest.mark.parametrize("atomic", [True, False])
def test_overwriting_leaves_the_new_bundle_and_nothing_else(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, atomic: bool
):
    if not atomic:
        monkeypatch.setattr(bundle_module, "_exchange", lambda first, second: False)
    (bundle.path / "engines").mkdir()
    new = write_bundle(bundle.path, lambda folder: build(folder, name="newer", external=None), overwrite=True)
    assert read_bundle(bundle.path) == new
    assert new.manifest.name == "newer"
    assert sorted(path.name for path in bundle.path.iterdir()) == [
        "README.md",
        "manifest.json",
        "tokenizer.json",
        "vision.onnx",
    ]
    assert [path.name for path in bundle.path.parent.iterdir() if path.name != "cache"] == ["tiny.rsedge"]


def test_what_is_no_bundle_is_never_replaced(tmp_path: Path):
    target = tmp_path / "thesis.rsedge"
    target.mkdir()
    (target / "chapter.txt").write_text("years of work")
    with pytest.raises(OutputError, match="is not a bundle"):
        write_bundle(target, build, overwrite=True)
    assert (target / "chapter.txt").read_text() == "years of work"
    (tmp_path / "file.rsedge").write_text("also work")
    with pytest.raises(OutputError, match="is not a bundle"):
        write_bundle(tmp_path / "file.rsedge", build, overwrite=True)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failed_build_leaves_the_old_bundle_and_nothing_else(bundle: Bundle, error: type[BaseException]):
    def failing(folder: Path) -> Manifest:
        (folder / "half").write_text("half")
        raise error("in the middle")

    with pytest.raises(error, match="in the middle"):
        write_bundle(bundle.path, failing, overwrite=True)
    assert read_bundle(bundle.path) == bundle
    with pytest.raises(error):
        write_bundle(bundle.path.with_name("other.rsedge"), failing)
    assert {path.name for path in bundle.path.parent.iterdir()} <= {"tiny.rsedge", "cache"}


def test_a_failed_rename_restores_the_old_bundle(bundle: Bundle, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bundle_module, "_exchange", lambda first, second: False)
    original, calls = Path.rename, []

    def rename(path: Path, target: Path) -> Path:
        calls.append(path)
        if len(calls) == 2:  # the new one into place, the old one being aside
            raise OSError(28, "No space left on device")
        return original(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OutputError, match="No space left on device"):
        write_bundle(bundle.path, build, overwrite=True)
    monkeypatch.undo()
    assert read_bundle(bundle.path) == bundle
    assert {path.name for path in bundle.path.parent.iterdir()} <= {"tiny.rsedge", "cache"}


def test_a_manifest_its_files_do_not_bear_out_is_not_written(tmp_path: Path):
    def lying(folder: Path) -> Manifest:
        manifest = build(folder)
        (folder / "tokenizer.json").write_text(TOKENIZER.replace("a", "b"))
        return manifest

    with pytest.raises(BundleError, match=r"tokenizer.json is altered"):
        write_bundle(tmp_path / "lie.rsedge", lying)
    assert not (tmp_path / "lie.rsedge").exists()


def test_the_manifest_is_written_last(tmp_path: Path):
    def looking(folder: Path) -> Manifest:
        manifest = build(folder)
        assert not (folder / "manifest.json").exists()
        assert not (tmp_path / "m.rsedge").exists()
        return manifest

    write_bundle(tmp_path / "m.rsedge", looking)


def test_what_appears_during_the_build_is_not_replaced(tmp_path: Path):
    def slow(folder: Path) -> Manifest:
        write_bundle(tmp_path / "m.rsedge", lambda other: build(other, name="faster"))
        return build(folder)

    with pytest.raises(OutputError, match="exists already"):
        write_bundle(tmp_path / "m.rsedge", slow)
    assert read_bundle(tmp_path / "m.rsedge").manifest.name == "faster"


def test_the_directory_has_ordinary_permissions(tmp_path: Path):
    mask = os.umask(0o022)
    try:
        assert stat.S_IMODE(write_bundle(tmp_path / "m.rsedge", build).path.stat().st_mode) == 0o755
    finally:
        os.umask(mask)


def test_a_missing_parent_is_said(tmp_path: Path):
    with pytest.raises(OutputError, match="does not exist: create it first"):
        write_bundle(tmp_path / "absent" / "m.rsedge", build)
