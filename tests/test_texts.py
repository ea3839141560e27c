"""Hidden characters and formulae, judged by Python's own Unicode tables."""

from __future__ import annotations

import sys
import unicodedata

import pytest

from rsedge.texts import cell, escape_hidden, plain
from rsedge.tomlfile import read_toml, write_toml

ORDINARY = [
    "Grüße, ça va?",
    "水域とビル",
    "مرحبا بالعالم",
    "שלום",
    "नमस्ते",
    "👩‍🌾 🏳️‍🌈 ❤️‍🔥 👍🏽",
    "x\u00a0y",
    "“a” – b",
    "",
]


@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_text_stays(text):
    assert plain(text) == text
    assert cell(text) == text


def test_every_control_and_direction_is_replaced():
    """Controls, surrogates, ends of lines and format characters, but for those that have a shape."""
    # Signs round numbers in Arabic, Syriac and Kaithi; above 0x13000 only those that stack hieroglyphs.
    shaped = {*range(0x600, 0x606), 0x6DD, 0x70F, 0x890, 0x891, 0x8E2, 0x110BD, 0x110CD}
    kept = [
        code
        for code in range(sys.maxunicode + 1)
        if unicodedata.category(chr(code)) in ("Cc", "Cf", "Cs", "Zl", "Zp")
        and plain(f"a{chr(code)}b") == f"a{chr(code)}b"
    ]
    assert {code for code in kept if code < 0x13000} <= shaped
    assert all(0x13430 <= code <= 0x1343F for code in kept if code >= 0x13000)


@pytest.mark.parametrize("text", ["a\u200db", "\u200d", "👩\u200db", "a\u200d👩", "pay\u200cpal"])
def test_joiners_stay_between_pictographs_alone(text):
    assert plain(text) == text.replace("\u200d", "\ufffd").replace("\u200c", "\ufffd")


def test_positions_stay():
    text = "a\x00b\r\n\u202ec\ud800"
    assert plain(text) == "a\ufffdb  \ufffdc\ufffd"
    assert len(plain(text)) == len(text)


def test_lines_stay_where_asked_for():
    assert plain("é\x1b[1m\nb\r\nc\td", lines=True) == "é\ufffd[1m\nb \nc d"
    assert plain("a\nb") == "a b"


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "＝", "＋", "－", "＠", "﹦", "﹢", "﹣", "﹫"])
@pytest.mark.parametrize("before", ["", " ", "\t", "\r", "\u3000", "\u00a0", '"', "'", "“", ' " '])
def test_no_cell_is_a_formula(start, before):
    assert cell(f"{before}{start}1") == f"'{plain(before)}{start}1"
    assert cell(f"a;{before}{start}1") == f"a;'{plain(before)}{start}1"


@pytest.mark.parametrize("value", [-1.5, -3, None, True])
def test_numbers_are_no_text(value):
    assert cell(value) is value


def test_toml_reads_back_what_was_written(tmp_path):
    values = {"scenes": ["a\u202eb\u2028\x7f\x1b.tif", "Grüße 水 👩‍🌾\n"], "t": {"\u200bkey": "\U000e0041"}}
    write_toml(tmp_path / "a.toml", values)
    assert read_toml(tmp_path / "a.toml") == values
    text = (tmp_path / "a.toml").read_text("utf-8")
    assert plain(text, lines=True) == text
    assert "Grüße 水 👩‍🌾" in text
    assert escape_hidden('a = "\ud800"') == 'a = "\ufffd"'
