"""The collector on small wheels of the real ones' inner layout, made here; no network."""

from __future__ import annotations

import gettext
import gzip
import io
import json
import struct
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from data import collect, sources, wheels
from data.catalogs import read_mo, read_po
from data.docstrings import Installed, read_docstrings, summary_and_prose
from data.errors import UserError
from data.languages import bcp47, written_in_own_script
from data.records import parse
from data.texts import GAP, clean, html_to_text, num_words

LICENCE_TEXT = "You may do as you like."


def write_wheel(
    folder: Path, name: str, version: str, members: Mapping[str, str | bytes], *, reverse: bool = False
) -> Path:
    """A wheel that pip accepts, with `members` beside its metadata; `reverse` stores them in another order."""
    stem = name.replace("-", "_")
    info = f"{stem}-{version}.dist-info"
    papers = {
        f"{info}/METADATA": f"Metadata-Version: 2.4\nName: {name}\nVersion: {version}\nLicense-Expression: MIT\n\nText",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": "",
        f"{info}/licenses/LICENSE": LICENCE_TEXT,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stem}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for member, content in sorted({**papers, **members}.items(), reverse=reverse):
            file.writestr(member, content)
    return path


def translation_file(component: str, locale: str) -> str:
    return f"homeassistant/components/{component}/translations/{locale}.json"


def lamp() -> dict[str, str]:
    """One component in English, German, Chinese and an English variant, with texts of every kind that is dropped."""
    english = {
        "config": {
            "step": {
                "user": {
                    "title": "Connect the lamp",
                    "description": "Enter the address of your lamp to connect it.",
                    "data": {"host": "Host"},
                    "data_description": {"host": "The hostname or IP address of your lamp."},
                }
            }
        },
        "services": {"dim": {"name": "Dim", "description": "Dims the lamp to <b>{level}</b> &amp; waits for it."}},
        "issues": {"old": {"title": "Old", "description": "See [the manual]({url}) of the lamp for details."}},
    }
    german = {
        "config": {
            "step": {
                "user": {
                    "title": "Brightlamp verbinden",
                    "description": "Gib die Adresse deiner Lampe ein, um sie zu verbinden.",
                    "data": {"host": "Host"},
                    "data_description": {"host": "The hostname or IP address of your lamp."},  # not translated
                }
            }
        },
        "services": {"dim": {"name": "[%key:common::dim%]", "description": "Dimmt die Lampe auf {level} und wartet."}},
    }
    chinese = {"services": {"dim": {"name": "调暗", "description": "将灯调暗到指定的亮度并等待。"}}}
    return {
        "homeassistant/components/lamp/manifest.json": json.dumps({"name": "Brightlamp"}),
        translation_file("lamp", "en"): json.dumps(english),
        translation_file("lamp", "de"): json.dumps(german),
        translation_file("lamp", "zh-Hans"): json.dumps({"title": "灯", **chinese}),
        translation_file("lamp", "en-GB"): json.dumps(english),
        "homeassistant/components/lamp/light.py": "raise SystemExit('imported')",
    }


def gather(tmp_path: Path, names: list[str], **keys: Any) -> dict[str, list[dict[str, str]]]:
    """Run the stage on the wheels in tmp_path/cache; the records of each file."""
    output = tmp_path / "out"
    collect.run(collect.Config(output=str(output), cache=str(tmp_path / "cache"), sources=names, **keys))
    return {path.stem: [json.loads(line) for line in path.read_text().splitlines()] for path in output.glob("*.jsonl")}


def texts(records: list[dict[str, str]]) -> list[tuple[str, str, str]]:
    return [(record["lang"], record["query"], record["passage"]) for record in records]


def test_labels_are_paired_with_their_descriptions_behind_the_name_of_the_product(tmp_path: Path) -> None:
    write_wheel(tmp_path / "cache", "homeassistant", "1.0", lamp())
    found = gather(tmp_path, ["homeassistant"])
    assert texts(found["titles"]) == [
        ("en", "Brightlamp: Connect the lamp", "Enter the address of your lamp to connect it."),
        ("en", "Brightlamp: Host", "The hostname or IP address of your lamp."),
        ("en", "Brightlamp: Dim", f"Dims the lamp to {GAP} & waits for it."),
        ("en", "Brightlamp: Old", "See the manual of the lamp for details."),
        ("de", "Brightlamp verbinden", "Gib die Adresse deiner Lampe ein, um sie zu verbinden."),
        ("zh-Hans", "灯: 调暗", "将灯调暗到指定的亮度并等待。"),
    ]


def test_sentences_are_paired_with_their_english_originals(tmp_path: Path) -> None:
    write_wheel(tmp_path / "cache", "homeassistant", "1.0", lamp())
    assert texts(gather(tmp_path, ["homeassistant"])["translations"]) == [
        (
            "de",
            "Gib die Adresse deiner Lampe ein, um sie zu verbinden.",
            "Enter the address of your lamp to connect it.",
        ),
        ("de", f"Dimmt die Lampe auf {GAP} und wartet.", f"Dims the lamp to {GAP} & waits for it."),
        ("zh-Hans", "将灯调暗到指定的亮度并等待。", f"Dims the lamp to {GAP} & waits for it."),
    ]


def test_every_row_is_a_record_with_its_kind_as_source_and_an_id_of_its_own(tmp_path: Path) -> None:
    write_wheel(tmp_path / "cache", "homeassistant", "1.0", lamp())
    for kind, records in gather(tmp_path, ["homeassistant"]).items():
        parsed = [parse(record) for record in records]
        assert {record.source for record in parsed} == {kind}
        assert len({record.id for record in parsed}) == len(parsed)
        assert all(record.id.startswith("homeassistant:") and not record.symmetric for record in parsed)


def test_what_is_dropped_is_counted_by_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_wheel(tmp_path / "cache", "homeassistant", "1.0", lamp())
    gather(tmp_path, ["homeassistant"])
    (papers,) = json.loads((tmp_path / "out/SOURCES.json").read_text())
    # titles: de host not translated, de dim unresolved, 4 of en-GB equal to en.
    # translations: de host and its label equal to English, de dim's name unresolved, too short: de title and zh's name
    assert papers["dropped"] == {"duplicate": 4, "not translated": 3, "too short": 2, "unresolved reference": 2}
    assert papers["pairs"] == {"titles": {"de": 1, "en": 4, "zh-Hans": 1}, "translations": {"de": 2, "zh-Hans": 1}}
    assert "unresolved reference" in capsys.readouterr().out


PO = r"""
# the header
msgid ""
msgstr "Content-Type: text/plain; charset=UTF-8\n"

#: a.py:3
msgid "Select the colour of the lamp"
msgstr "Farbe der Lampe auswählen"

msgctxt "verb"
msgid ""
"Open the "
"\"window\" now,\tplease"
msgstr ""
"Bitte jetzt das "
"\"Fenster\" öffnen"

#, python-format
msgid "One lamp was found here"
msgid_plural "%(count)d lamps were found here"
msgstr[0] "Hier wurde eine Lampe gefunden"
msgstr[1] "Hier wurden %(count)d Lampen gefunden"

#, fuzzy
#| msgid "Delete the red lamp"
msgid "Delete all the red lamps"
msgstr "Lösche die rote Lampe"

msgid "This one is not translated yet"
msgstr ""
#~ msgid "This one is gone from the program"
#~ msgstr "Das gibt es nicht mehr im Programm"
msgid "The last one has no blank line"
msgstr "Die letzte hat keine Leerzeile"
"""


def test_po_entries_keep_context_plural_and_guess_apart() -> None:
    assert [(entry.english, entry.translation, entry.fuzzy) for entry in read_po(PO)] == [
        ("Select the colour of the lamp", "Farbe der Lampe auswählen", False),
        ('Open the "window" now,\tplease', 'Bitte jetzt das "Fenster" öffnen', False),
        ("%(count)d lamps were found here", "Hier wurden %(count)d Lampen gefunden", False),
        ("Delete all the red lamps", "Lösche die rote Lampe", True),
        ("The last one has no blank line", "Die letzte hat keine Leerzeile", False),
    ]


def mo_file(messages: Mapping[str, str], order: str = "<") -> bytes:
    """A compiled catalogue as the GNU manual lays it out."""
    items = sorted((key.encode(), value.encode()) for key, value in messages.items())
    tables, strings = [], b""
    start = 28 + 16 * len(items)
    for column in (0, 1):
        for item in items:
            tables.append(struct.pack(f"{order}2I", len(item[column]), start + len(strings)))
            strings += item[column] + b"\0"
    header = struct.pack(f"{order}7I", 0x950412DE, 0, len(items), 28, 28 + 8 * len(items), 0, start)
    return header + b"".join(tables) + strings


MESSAGES = {
    "": "Content-Type: text/plain; charset=UTF-8\nPlural-Forms: nplurals=3; plural=n==1 ? 0 : n<5 ? 1 : 2;\n",
    "Select the colour": "Wybierz kolor",
    "menu\x04Open the file": "Otwórz plik",
    "One lamp\0%d lamps": "Jedna lampa\0%d lampy\0%d lamp",
}


@pytest.mark.parametrize("order", ["<", ">"])
def test_mo_entries_are_those_of_the_standard_library(order: str) -> None:
    content = mo_file(MESSAGES, order)
    reference = gettext.GNUTranslations(io.BytesIO(content))
    entries = {entry.english: entry.translation for entry in read_mo(content)}
    assert entries == {
        "Select the colour": reference.gettext("Select the colour"),
        "Open the file": reference.pgettext("menu", "Open the file"),
        "%d lamps": reference.ngettext("One lamp", "%d lamps", 7),
    }


@pytest.mark.parametrize("cut", [0, 10, 30, 60, -1])
def test_a_cut_mo_file_is_refused(cut: int) -> None:
    content = mo_file(MESSAGES)
    with pytest.raises(ValueError, match=r"\.mo file"):
        list(read_mo(content[:cut] if cut >= 0 else content[:-40]))


def test_guesses_that_a_package_has_compiled_are_not_taken(tmp_path: Path) -> None:
    write_wheel(
        tmp_path / "cache",
        "apache-superset",
        "6.0",
        {
            "superset/translations/de/LC_MESSAGES/messages.po": PO,
            "superset/translations/de/LC_MESSAGES/messages.mo": mo_file(
                {"Delete all the red lamps": "Lösche die rote Lampe"}
            ),
            "superset/translations/pl/LC_MESSAGES/messages.mo": mo_file(
                {"Only the compiled one": "Tylko ten skompilowany"}
            ),
            "superset/translations/en/LC_MESSAGES/messages.po": PO,
        },
    )
    found = texts(gather(tmp_path, ["apache-superset"])["translations"])
    assert ("pl", "Tylko ten skompilowany", "Only the compiled one") in found
    assert ("de", f"Hier wurden {GAP} Lampen gefunden", f"{GAP} lamps were found here") in found
    assert len(found) == 5
    (papers,) = json.loads((tmp_path / "out/SOURCES.json").read_text())
    assert papers["dropped"] == {"marked as a guess": 1}


def test_a_plural_left_as_the_english_singular_is_no_translation(tmp_path: Path) -> None:
    po = 'msgid "One page was found"\nmsgid_plural "%d pages were found"\nmsgstr[0] "One page was found"\n'
    write_wheel(tmp_path / "cache", "sphinx", "9", {"sphinx/locale/id/LC_MESSAGES/sphinx.po": po})
    assert gather(tmp_path, ["sphinx"]) == {}


def service(name: str, operations: Mapping[str, str]) -> bytes:
    documented = {operation: {"name": operation, "documentation": text} for operation, text in operations.items()}
    return json.dumps({"metadata": {"serviceId": name}, "operations": documented, "shapes": {}}).encode()


def test_operations_are_paired_with_their_documentation(tmp_path: Path) -> None:
    html = "<p>Deletes the <i>named</i> bucket.</p><note><p>It must be empty &amp; unused.</p></note>"
    old = service("S3", {"DeleteBucket": "<p>The old text of the operation.</p>"})
    new = service("S3", {"DeleteBucket": html, "GetDBInstance": "<p>Gets an instance of it.</p>"})
    write_wheel(
        tmp_path / "cache",
        "botocore",
        "1.0",
        {
            "botocore/data/s3/2006-03-01/service-2.json.gz": gzip.compress(old),
            "botocore/data/s3/2016-03-01/service-2.json.gz": gzip.compress(new),
            "botocore/data/sqs/2012-11-05/service-2.json": service("SQS", {"Purge": "Deletes all available messages."}),
        },
    )
    assert texts(gather(tmp_path, ["botocore"])["api"]) == [
        ("en", "S3: Delete Bucket", "Deletes the named bucket. It must be empty & unused."),
        ("en", "S3: Get DB Instance", "Gets an instance of it."),
        ("en", "SQS: Purge", "Deletes all available messages."),
    ]


MODULE = '''"""Shine light on things.

A lamp is switched with :func:`~lamp.on`, see ``lamp.off``.
"""
raise SystemExit("imported")

class Lamp:
    """A lamp of one colour.

    It takes little power [1]_ and
    lasts for *many* years.

    >>> Lamp("red")

    Parameters
    ----------
    colour : str
        Its colour, in words.
    """

    def dim(self):
        """Make the lamp less bright.

        Args:
            level: how much of it.
        """

    async def blink(self, rate):
        """Blink at a rate.

        The rate is given in blinks a minute::

            lamp.blink(60)
        """
'''


def test_docstrings_give_the_summary_and_the_prose_before_the_first_section() -> None:
    assert read_docstrings(MODULE.encode()) == [
        (1, "Shine light on things.", "A lamp is switched with lamp.on, see lamp.off."),
        (7, "A lamp of one colour.", "It takes little power and lasts for many years."),
        (28, "Blink at a rate.", "The rate is given in blinks a minute:"),
    ]


@pytest.mark.parametrize(
    "docstring", ["Example:\n\nSome prose.", ".. note:: x\n\nSome prose.", ">>> f()\n\nProse.", "Only this."]
)
def test_a_docstring_without_a_summary_or_prose_gives_nothing(docstring: str) -> None:
    assert "" in summary_and_prose(docstring)


def test_a_docstring_that_is_no_unicode_text_can_still_be_written() -> None:
    (found,) = read_docstrings(b'"""Split a pair.\n\nThe half \\ud800 alone is no text.\n"""')
    assert found.body == "The half ? alone is no text."


def test_installed_packages_are_read_without_being_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "library").mkdir()
    (tmp_path / "library/light.py").write_text('"""Light of the library.\n\nIt shines on everything here.\n"""')
    site = tmp_path / "site"
    (site / "lamp/tests").mkdir(parents=True)
    (site / "lamp/core.py").write_text(MODULE)
    (site / "lamp/tests/test_core.py").write_text(MODULE)
    (site / "lamp/broken.py").write_text('"""Broken."""\ndef (:')
    info = site / "lamp-2.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.4\nName: Lamp\nVersion: 2.0\nLicense: BSD\n")
    (info / "RECORD").write_text(
        "lamp/core.py,,\nlamp/tests/test_core.py,,\nlamp/broken.py,,\nlamp-2.0.dist-info/METADATA,,\n"
    )
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "library"))
    monkeypatch.setattr(sys, "path", [str(site)])
    found = gather(tmp_path, ["docstrings"])["docstrings"]
    (papers,) = json.loads((tmp_path / "out/SOURCES.json").read_text())
    assert [record["query"] for record in found] == [
        "Light of the library.",
        "Shine light on things.",
        "A lamp of one colour.",
        "Blink at a rate.",
    ]
    assert found[2]["id"] == "docstrings:lamp/lamp/core.py:7"
    assert papers["packages"][1] == {"name": "lamp", "version": "2.0", "licence": "BSD"}
    assert papers["not_read"] == ["lamp/lamp/broken.py: not readable as Python (SyntaxError)"]
    assert Installed().licence == "that of each package"


@pytest.mark.parametrize(
    ("raw", "seen"),
    [
        ("Fish &amp; chips&nbsp;<b>now</b>", "Fish & chips now"),
        ("one<br/>two<p>three</p>", "one two three"),
        ("请按<b>确定</b>键", "请按确定键"),
        ("a **bold** and `code` word, 2**3 and 4 * 5", "a bold and code word, 2**3 and 4 * 5"),
        ("**名前{name}**は", f"名前{GAP}は"),
        ("[Learn more]({url}) or 【了解更多】({url})", "Learn more or 了解更多"),
        ("# Title\n- first\n- second", "Title first second"),
        ("%(count)d of %s in %1$s at %.2f, 100%", f"{GAP} of {GAP} in {GAP} at {GAP}, 100%"),
        ("{name}, ${name}, {{ a.b }}, {$ x || 'y' $} and {0}", f"{GAP}, {GAP}, {GAP}, {GAP} and {GAP}"),
        ("%(a)s %(b)s %s", GAP),
        ('{"key": 1} stays, 50% stays, 100%% is one', '{"key": 1} stays, 50% stays, 100% is one'),
        ("zero\u200bwidth, soft\u00adhyphen, می\u200cخواهم", "zerowidth, softhyphen, می\u200cخواهم"),
        ("e\u0301  \n\t x", "é x"),
    ],
)
def test_texts_are_cleaned(raw: str, seen: str) -> None:
    assert clean(raw) == seen


def test_words_of_unspaced_scripts_and_gaps_are_counted_apart() -> None:
    assert num_words("three short words") == 3
    assert num_words("设备的名称") == 2
    assert num_words(f"{GAP} of {GAP}") == 1


def test_html_becomes_text_with_blanks_between_blocks() -> None:
    assert (
        html_to_text("<p>One <code>x</code>.</p><ul><li>two</li><li>three &lt;b&gt;</li></ul>")
        == "One x. two three <b>"
    )


@pytest.mark.parametrize(
    ("locale", "tag"),
    [
        ("de", "de"),
        ("de_DE", "de"),
        ("pt_BR", "pt-BR"),
        ("pt_PT", "pt"),
        ("es_419", "es-419"),
        ("zh", "zh-Hans"),
        ("zh_CN", "zh-Hans"),
        ("zh_TW", "zh-Hant"),
        ("zh-Hant", "zh-Hant"),
        ("sr@latin", "sr-Latn"),
        ("sr_Latn", "sr-Latn"),
        ("ca@valencia", "ca-valencia"),
        ("iw", "he"),
        ("gsw", "gsw"),
        ("en_GB.UTF-8", "en-GB"),
        ("__pycache__", ""),
        ("templates", ""),
    ],
)
def test_locales_become_bcp47_tags(locale: str, tag: str) -> None:
    assert bcp47(locale) == tag
    assert not tag or bcp47(tag) == tag


def test_a_text_in_another_script_than_its_language_is_told() -> None:
    assert written_in_own_script("Выберите Wi-Fi", "ru")
    assert not written_in_own_script("Select Wi-Fi", "ru")
    assert not written_in_own_script("آپ ایک پاس ورڈ", "pa")  # Urdu in a Punjabi catalogue
    assert written_in_own_script("Izaberite", "sr-Latn")
    assert written_in_own_script("Wählen", "de")


def catalogue(*pairs: tuple[str, str]) -> str:
    return "\n".join(f'msgid "{english}"\nmsgstr "{text}"' for english, text in pairs)


def test_pairs_are_judged_alike_over_all_sources(tmp_path: Path) -> None:
    same = ("The lamp is switched on", "Лампа включена сейчас")
    short = ("Lamp on", "Лампа включена сейчас и здесь")
    latin = ("Enter the name of it", "Enter the name of that")
    equal = ("УМНЫЙ дом Алисы здесь", "умный дом Алисы здесь")
    for name in ("django", "wagtail"):
        member = f"{name}/locale/ru/LC_MESSAGES/django.po"
        write_wheel(tmp_path / "cache", name, "1.0", {member: catalogue(same, short, latin, equal)})
    found = gather(tmp_path, ["django", "wagtail"])
    papers = json.loads((tmp_path / "out/SOURCES.json").read_text())
    assert texts(found["translations"]) == [("ru", same[1], same[0])]
    assert papers[0]["dropped"]["too short"] == 1
    assert papers[0]["dropped"]["not in the script of its language"] == 1
    assert papers[1]["dropped"]["duplicate"] == 1


def test_only_the_languages_asked_for_are_kept(tmp_path: Path) -> None:
    write_wheel(tmp_path / "cache", "homeassistant", "1.0", lamp())
    found = gather(tmp_path, ["homeassistant"], languages=["zh"])
    assert {record["lang"] for records in found.values() for record in records} == {"zh-Hans"}


def test_the_same_members_in_any_order_give_the_same_bytes(tmp_path: Path) -> None:
    outputs = []
    for name, reverse in (("one", False), ("two", True)):
        write_wheel(tmp_path / name / "cache", "homeassistant", "1.0", lamp(), reverse=reverse)
        gather(tmp_path / name, ["homeassistant"])
        out = tmp_path / name / "out"
        outputs.append({path.name: path.read_bytes() for path in out.glob("*.jsonl")})
    assert outputs[0] == outputs[1]


def test_a_second_run_gives_the_same_folder(tmp_path: Path) -> None:
    write_wheel(tmp_path / "cache", "homeassistant", "1.0", lamp())
    folders = []
    for _ in range(2):
        gather(tmp_path, ["homeassistant"])
        folders.append({path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()})
    assert folders[0] == folders[1]


def test_papers_name_version_licence_and_hash_and_nothing_else_is_left(tmp_path: Path) -> None:
    wheel = write_wheel(tmp_path / "cache", "homeassistant", "2026.1", lamp())
    gather(tmp_path, ["homeassistant"])
    (papers,) = json.loads((tmp_path / "out/SOURCES.json").read_text())
    digest = subprocess.run(["sha256sum", wheel], capture_output=True, text=True, check=True).stdout.split()[0]
    assert (papers["version"], papers["licence"], papers["sha256"]) == ("2026.1", "MIT", digest)
    assert LICENCE_TEXT in (tmp_path / "out/LICENSES/homeassistant.txt").read_text()
    names = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*")}
    assert names == {"titles.jsonl", "translations.jsonl", "SOURCES.json", "LICENSES", "LICENSES/homeassistant.txt"}


def test_files_of_an_earlier_run_do_not_stay_beside_the_papers_of_this_one(tmp_path: Path) -> None:
    write_wheel(tmp_path / "cache", "homeassistant", "1.0", lamp())
    members = {"botocore/data/sqs/1/service-2.json": service("SQS", {"Purge": "Deletes all available messages."})}
    write_wheel(tmp_path / "cache", "botocore", "1.0", members)
    gather(tmp_path, ["homeassistant"])
    assert set(gather(tmp_path, ["botocore"])) == {"api"}
    assert [path.name for path in (tmp_path / "out/LICENSES").iterdir()] == ["botocore.txt"]


def test_member_names_never_reach_the_file_system(tmp_path: Path) -> None:
    hostile = {"homeassistant/components/../../../../escaped/translations/de.json": "{}"}
    hostile["homeassistant/components//etc/translations/en.json"] = json.dumps(
        {"name": "x", "description": "a b c d e"}
    )
    write_wheel(tmp_path / "cache", "homeassistant", "1.0", {**lamp(), **hostile})
    before = {path for path in tmp_path.rglob("*") if "out" not in path.parts}
    gather(tmp_path, ["homeassistant"])
    assert {path for path in tmp_path.rglob("*") if "out" not in path.relative_to(tmp_path).parts} == before


def test_members_that_are_damaged_or_too_large_are_told_and_the_rest_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wheels, "MEMBER_BYTES", 4_000)
    bad = {
        translation_file("bomb", "en"): " " * 5_000,
        translation_file("list", "en"): "[1, 2",
        translation_file("flip", "en"): json.dumps({"title": "damaged here"}),
    }
    path = write_wheel(tmp_path / "cache", "homeassistant", "1.0", {**lamp(), **bad})
    with zipfile.ZipFile(path) as file:
        start = file.getinfo(translation_file("flip", "en")).header_offset
    content = bytearray(path.read_bytes())
    content[start + 30 + len(translation_file("flip", "en")) + 5] ^= 0xFF
    path.write_bytes(content)
    assert len(gather(tmp_path, ["homeassistant"])["titles"]) == 6
    (papers,) = json.loads((tmp_path / "out/SOURCES.json").read_text())
    assert [problem.split("/")[2] for problem in papers["not_read"]] == ["bomb", "flip", "list"]
    assert "larger than" in papers["not_read"][0]


def test_a_gzip_bomb_inside_a_wheel_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MEMBER_BYTES", 10_000)
    bomb = gzip.compress(b" " * 1_000_000)
    write_wheel(tmp_path / "cache", "botocore", "1.0", {"botocore/data/s3/1/service-2.json.gz": bomb})
    assert gather(tmp_path, ["botocore"]) == {}
    (papers,) = json.loads((tmp_path / "out/SOURCES.json").read_text())
    assert "unpacks to more" in papers["not_read"][0]


def test_a_damaged_wheel_is_named_with_the_mend(tmp_path: Path) -> None:
    path = write_wheel(tmp_path / "cache", "homeassistant", "1.0", lamp())
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"homeassistant-1\.0-py3.*refresh=true"):
        gather(tmp_path, ["homeassistant"])


def test_a_wheel_in_the_cache_is_used_without_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for version in ("1.9", "1.10", "1.2"):
        write_wheel(tmp_path, "apache-superset", version, {})
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("pip was called"))
    assert wheels.Wheel(wheels.fetch("apache-superset", tmp_path)).version == "1.10"
    assert wheels.Wheel(wheels.fetch("Apache.Superset", tmp_path, version="1.9")).version == "1.9"


def test_pip_itself_fetches_into_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_wheel(tmp_path / "index", "homeassistant", "3.0", lamp())
    write_wheel(tmp_path / "index", "homeassistant", "2.0", lamp())
    write_wheel(tmp_path / "cache", "homeassistant", "1.0", lamp())
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    pinned = wheels.fetch("homeassistant", tmp_path / "cache", version="2.0")
    newest = wheels.fetch("homeassistant", tmp_path / "cache", refresh=True)
    assert pinned.name == "homeassistant-2.0-py3-none-any.whl"
    assert newest.name == "homeassistant-3.0-py3-none-any.whl"
    assert len(list((tmp_path / "cache").iterdir())) == 3  # and no half download beside the wheels


def test_what_pip_says_reaches_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(UserError, match=r"could not fetch django==9\.9: ERROR: No matching.*check the network"):
        wheels.fetch("django", tmp_path, version="9.9")


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    write_wheel(tmp_path / "cache", "homeassistant", "1.0", {})
    with pytest.raises(UserError, match=r"output=.*file/out.*name a folder"):
        collect.run(collect.Config(output=str(tmp_path / "file/out"), cache=str(tmp_path / "cache")))
    with pytest.raises(UserError, match=r"cache=.*file.*name a folder"):
        wheels.fetch("django", tmp_path / "file")


def test_wrong_keys_are_told_with_their_mend() -> None:
    config = collect.Config(output="x", sources=["djang", "sphinx"], versions={"django": "6"}, languages=["zh_CN"])
    assert config.check() == [
        "sources=djang: no such source; did you mean django?",
        "languages=zh_CN: not the BCP-47 tag pairs are labelled with; write zh-Hans",
        "versions.django=6: not a package that is fetched here; remove it",
    ]
    assert collect.Config(output="x", languages=["zh", "pt-BR", "sr-Latn"]).check() == []
    assert "nothing to collect" in collect.Config(output="x", sources=[]).check()[0]


def test_the_cache_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_wheel(tmp_path / "wheels", "homeassistant", "1.0", lamp())
    monkeypatch.setenv("QUINTET_CACHE", str(tmp_path))
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("pip was called"))
    collect.run(collect.Config(output=str(tmp_path / "out")))
    assert (tmp_path / "out/titles.jsonl").is_file()
