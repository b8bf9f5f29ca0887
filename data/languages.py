"""Language tags: from the locale names software uses to BCP-47, and the script a language is written in."""

from __future__ import annotations

import re
from collections.abc import Iterable

# Software catalogues name one language in several ways. Where the region only repeats the default of a
# catalogue without one, it is dropped, so that a language is counted once.
_DEFAULT_REGION = {
    "az": "AZ",
    "cs": "CZ",
    "da": "DK",
    "de": "DE",
    "el": "GR",
    "es": "ES",
    "fi": "FI",
    "fr": "FR",
    "he": "IL",
    "hi": "IN",
    "hr": "HR",
    "hu": "HU",
    "id": "ID",
    "is": "IS",
    "it": "IT",
    "ja": "JP",
    "ka": "GE",
    "ko": "KR",
    "nb": "NO",
    "nl": "NL",
    "pa": "IN",
    "pl": "PL",
    "pt": "PT",
    "ro": "RO",
    "ru": "RU",
    "sk": "SK",
    "sl": "SI",
    "sv": "SE",
    "th": "TH",
    "tr": "TR",
    "uk": "UA",
    "vi": "VN",
}
_RENAMED = {"iw": "he", "in": "id", "no": "nb", "ji": "yi"}
_CHINESE = {"": "Hans", "CN": "Hans", "SG": "Hans", "TW": "Hant", "HK": "Hant", "MO": "Hant"}
_MODIFIERS = {"latin": "Latn", "cyrillic": "Cyrl", "euro": ""}

_LETTERS = {
    "Arab": "\u0600-\u06ff\u0750-\u077f",
    "Armn": "\u0530-\u058f",
    "Beng": "\u0980-\u09ff",
    "Cyrl": "\u0400-\u04ff",
    "Deva": "\u0900-\u097f",
    "Ethi": "\u1200-\u137f",
    "Geor": "\u10a0-\u10ff",
    "Grek": "\u0370-\u03ff",
    "Gujr": "\u0a80-\u0aff",
    "Guru": "\u0a00-\u0a7f",
    "Hang": "\uac00-\ud7af",
    "Hani": "\u3400-\u9fff",
    "Hebr": "\u0590-\u05ff",
    "Jpan": "\u3040-\u30ff\u3400-\u9fff",
    "Khmr": "\u1780-\u17ff",
    "Knda": "\u0c80-\u0cff",
    "Laoo": "\u0e80-\u0eff",
    "Mlym": "\u0d00-\u0d7f",
    "Mymr": "\u1000-\u109f",
    "Orya": "\u0b00-\u0b7f",
    "Sinh": "\u0d80-\u0dff",
    "Taml": "\u0b80-\u0bff",
    "Telu": "\u0c00-\u0c7f",
    "Thaa": "\u0780-\u07bf",
    "Thai": "\u0e00-\u0e7f",
}
# Languages written in one script other than Latin; those written in several (az, kk, ks, sr, uz) are left out.
_WRITTEN_IN = {
    "Arab": "ar ckb fa ps ug ur",
    "Armn": "hy",
    "Beng": "as bn",
    "Cyrl": "be bg ky mk os ru tg tt udm uk",
    "Deva": "brx hi kok mai mr ne",
    "Ethi": "am",
    "Geor": "ka",
    "Grek": "el",
    "Gujr": "gu",
    "Guru": "pa",
    "Hang": "ko",
    "Hani": "zh",
    "Hebr": "he yi",
    "Jpan": "ja",
    "Khmr": "km",
    "Knda": "kn",
    "Laoo": "lo",
    "Mlym": "ml",
    "Mymr": "my",
    "Orya": "or",
    "Sinh": "si",
    "Taml": "ta",
    "Telu": "te",
    "Thaa": "dv",
    "Thai": "th",
}
_ALPHABET = {
    language: re.compile(f"[{_LETTERS[script]}]") for script, names in _WRITTEN_IN.items() for language in names.split()
}


def bcp47(locale: str) -> str:
    """The BCP-47 tag of a locale name such as `pt_BR`, `sr@latin` or `zh_TW`; "" when it names no language."""
    name, _, modifier = locale.partition("@")
    language, *parts = re.split(r"[-_]", name.partition(".")[0])
    parts.append(_MODIFIERS.get(modifier, modifier))
    if not re.fullmatch(r"[A-Za-z]{2,3}", language):
        return ""
    language = _RENAMED.get(language.lower(), language.lower())
    script = next((part.title() for part in parts if re.fullmatch(r"[A-Za-z]{4}", part)), "")
    region = next((part.upper() for part in parts if re.fullmatch(r"[A-Za-z]{2}|[0-9]{3}", part)), "")
    if language == "zh":
        script, region = script or _CHINESE.get(region, ""), ""
    if region == _DEFAULT_REGION.get(language):
        region = ""
    variant = next((part for part in parts if re.fullmatch(r"[a-z]{5,8}", part)), "")
    return "-".join(part for part in (language, script, region, variant) if part)


def written_in_own_script(text: str, lang: str) -> bool:
    """Whether `text` has a letter of the script of `lang`; true where that script is Latin or not known here."""
    language, _, rest = lang.partition("-")
    letters = _ALPHABET.get(language)
    return letters is None or rest == "Latn" or letters.search(text) is not None


def asked_for(lang: str, wanted: Iterable[str]) -> bool:
    """Whether `lang` is one of `wanted`, or belongs to one: `zh` asks for `zh-Hans` and `zh-Hant`."""
    return any(lang == tag or lang.startswith(tag + "-") for tag in wanted)
