"""Text to token ids and back: a Hugging Face `tokenizer.json`, or one token a character."""

import dataclasses
import json
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from jaxdyn.data.jsonl import require_unicode
from jaxdyn.data.templates import Rendered
from jaxdyn.storage.paths import one_line
from jaxdyn.storage.reading import SETTINGS_BYTES, read_bytes, read_object, shown
from jaxdyn.types import JaxdynError

TEMPLATE = "chat_template.jinja"
SPECIAL = tuple(f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_BYTE = re.compile("<0x[0-9A-F]{2}>")


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A `tokenizers.Tokenizer` with the ids a language model needs beside it.

    `stop_ids` are the tokens that end a completion; the first of them is the one written at the
    end of a supervised completion. `pad_id` fills unused slots; masks go by length, so it may
    equal a stop id. `settings` is the content of `tokenizer_config.json`, kept for `save`, and
    `chat_template` the checkpoint's own, if it has one.
    """

    backend: tokenizers.Tokenizer
    pad_id: int
    stop_ids: tuple[int, ...]
    bos_id: int | None = None
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    chat_template: str | None = None

    @property
    def vocab_size(self) -> int:
        """How many ids there are, special tokens included."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @cached_property
    def largest_id(self) -> int:
        """The largest id; there may be gaps below it."""
        return max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1)

    def encode(self, text: str, special_tokens: bool = True) -> list[int]:
        """Token ids of `text`, after the beginning-of-sequence token if the tokenizer adds one.

        It adds none to what a chat template wrote, nor to a text that begins with that token.
        Raises JaxdynError for a character the tokenizer has no token for.
        """
        special_tokens = special_tokens and self.adds_to(text)
        try:
            return self.backend.encode(text, add_special_tokens=special_tokens).ids
        except Exception as error:  # the library raises bare Exceptions
            unknown = [c for c in text if self.backend.token_to_id(c) is None]
            what = f"has no token for {unknown[0]!r}" if unknown else f"failed ({error})"
            raise JaxdynError(f"the tokenizer {what} in the text {text[:60]!r}") from error

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """How many tokens `encode` gives each of many texts, on all cores."""
        found = [0] * len(texts)
        adds = [self.adds_to(text) for text in texts]
        for special in (True, False):
            places = [i for i, added in enumerate(adds) if added == special]
            chosen = [texts[i] for i in places]
            try:
                many = self.backend.encode_batch_fast(chosen, add_special_tokens=special)
                counts = [len(encoded.ids) for encoded in many]
            except Exception:  # as in `encode`, which says which text it was
                counts = [len(self.encode(text)) for text in chosen]
            for i, count in zip(places, counts, strict=True):
                found[i] = count
        return found

    def adds_to(self, text: str) -> bool:
        """Whether a text still lacks the special tokens that the tokenizer adds."""
        begins = self._beginning is not None and text.startswith(self._beginning)
        return not (begins or isinstance(text, Rendered))

    @cached_property
    def _beginning(self) -> str | None:
        return None if self.bos_id is None else self.backend.id_to_token(self.bos_id)

    @property
    def special_tokens(self) -> dict[str, Any]:
        """The special tokens by their names in `tokenizer_config.json`, as templates see them."""
        named = {key: _content(self.settings.get(key)) for key in SPECIAL}
        return {key: token for key, token in named.items() if token is not None}

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids` on its own, special tokens left out."""
        return self.backend.decode(list(ids), skip_special_tokens=True)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """What each of a completion's tokens adds to its text, special tokens by their names.

        Of a character that takes several tokens the last has it.
        """
        found: list[str] = []
        plain: list[int] = []  # from the last token on before which nothing matters to the next
        said = ""
        for i in ids:
            text, alone = self.decode([*plain, i]), self.decode([i])
            name = self.backend.id_to_token(i) or ""
            if text == said and not alone:  # a special token
                found.append(name)
                continue
            plain.append(i)
            if text.endswith("\ufffd"):
                found.append("")
                continue
            found.append(text[len(said) :])
            # A run of tokens of single bytes is decoded as a whole, and must not be cut.
            cut = alone and "\ufffd" not in alone and not _BYTE.fullmatch(name)
            plain, said = ([i], alone) if cut else (plain, text)
        return found

    def decode_completion(self, ids: Sequence[int]) -> str:
        """The text that `ids` add to a prompt: without the final stop token, special tokens left
        out, and with the leading space that some tokenizers drop at the start of a text.
        """
        ids = list(ids)
        if ids and ids[-1] in self.stop_ids:
            ids = ids[:-1]
        anchor = [self._anchor_id]
        return self.decode(anchor + ids)[len(self.decode(anchor)) :]

    @cached_property
    def _anchor_id(self) -> int:
        """A token of one plain character, to stand in for the text before a completion."""
        ids = range(self.vocab_size)
        return next((i for i in ids if (t := self.decode([i])).isalnum() and len(t) == 1), 0)

    def save(self, directory: str | Path) -> None:
        """Write `tokenizer.json`, `tokenizer_config.json` and `generation_config.json`.

        transformers' PreTrainedTokenizerFast and `load_tokenizer` read them back. The last file
        is there because it alone can list several stop ids. A chat template that is not in
        `settings` goes into `chat_template.jinja`.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self.backend.save(str(directory / "tokenizer.json"))
        ids = {"eos": self.stop_ids[0], "pad": self.pad_id}
        ids |= {} if self.bos_id is None else {"bos": self.bos_id}
        named = {f"{role}_token": self.backend.id_to_token(i) for role, i in ids.items()}
        defaults: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
        }
        _write_json(directory / "tokenizer_config.json", {**defaults, **self.settings, **named})
        generation: dict[str, Any] = {f"{role}_token_id": i for role, i in ids.items()}
        generation["eos_token_id"] = list(self.stop_ids)
        _write_json(directory / "generation_config.json", generation)
        inside = _default_template(self.settings.get("chat_template"), directory)
        if self.chat_template is not None and self.chat_template != inside:
            (directory / TEMPLATE).write_text(self.chat_template, encoding="utf-8")


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """Read a Hugging Face directory's tokenizer and the ids that end, begin and pad a sequence.

    Stop ids: `eos_token_id` (one or a list) of generation_config.json, else the `eos_token` of
    tokenizer_config.json, else `eos_token_id` of config.json. Padding: `pad_token` of
    tokenizer_config.json, else `pad_token_id` of config.json and generation_config.json, else
    the first stop id. The chat template: chat_template.jinja, else the one of
    tokenizer_config.json, of several the one called `default`.

    Raises JaxdynError if a file is missing or malformed, or if nothing names a stop token.
    """
    directory = Path(directory)
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise JaxdynError(f"no tokenizer.json in {directory}")
    backend = _read_backend(path)
    read = lambda name: read_object(directory / name) if (directory / name).is_file() else {}
    settings, model = read("tokenizer_config.json"), read("config.json")
    generation = read("generation_config.json")
    _require_tokens(settings, directory / "tokenizer_config.json")
    files = ((generation, "generation_config.json"), (model, "config.json"))

    def named(role: str) -> list[int]:
        content = _content(settings.get(role))
        index = backend.token_to_id(content) if isinstance(content, str) else None
        return [] if index is None else [index]

    eos = named("eos_token")
    ends = [_ids(data, "eos_token_id", directory / name) for data, name in files]
    stops = ends[0] or eos or ends[1]
    if not stops:
        raise JaxdynError(
            f"nothing in {directory} names a stop token: give eos_token_id in "
            "generation_config.json or eos_token in tokenizer_config.json"
        )
    # The tokenizer's own end-of-sequence token comes first: generation may stop at others too.
    stops = [i for i in eos if i in stops] + stops
    pads = [i for data, n in files[::-1] for i in _ids(data, "pad_token_id", directory / n)]
    begins = [i for data, n in files for i in _ids(data, "bos_token_id", directory / n)]
    bos_id = next(iter(named("bos_token") + begins), None)
    if bos_id is not None and backend.id_to_token(bos_id) is not None:
        _set_beginning(backend, bos_id, settings.get("add_bos_token"))
    return Tokenizer(
        backend=backend,
        pad_id=(named("pad_token") + pads + stops)[0],
        stop_ids=tuple(dict.fromkeys(stops)),
        bos_id=bos_id,
        settings=settings,
        chat_template=_read_template(directory, settings),
    )


def character_tokenizer(alphabet: str) -> Tokenizer:
    """One token a character of `alphabet`, after `<pad>`, `<s>` and `</s>`; adds `<s>`.

    `decode(encode(text)) == text` for every text over the alphabet.
    """
    if not alphabet:
        raise JaxdynError("a character tokenizer needs a non-empty alphabet")
    special = ["<pad>", "<s>", "</s>"]
    tokens = [*special, *dict.fromkeys(alphabet)]
    # No unknown token: an unknown character is an error, never silently another token.
    model = models.WordLevel({token: i for i, token in enumerate(tokens)})
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(special)
    _set_beginning(backend, 1, True)
    return Tokenizer(backend=backend, pad_id=0, stop_ids=(2,), bos_id=1)


def _set_beginning(backend: tokenizers.Tokenizer, bos_id: int, wanted: bool | None) -> None:
    """Make the tokenizer add its beginning-of-sequence token, or not, where that is stated."""
    if wanted is None or wanted == (bos_id in backend.encode("").ids):
        return
    bos = backend.id_to_token(bos_id)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A" if wanted else "$A", special_tokens=[(bos, bos_id)]
    )


def _content(token: Any) -> Any:
    """A special token's text; newer files have an object in its place."""
    return token.get("content") if isinstance(token, dict) else token


def _read_template(directory: Path, settings: dict[str, Any]) -> str | None:
    path = directory / TEMPLATE
    if not path.is_file():
        return _default_template(settings.get("chat_template"), directory)
    try:
        return read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise JaxdynError(f"cannot read {path}: {error}") from error


def _default_template(value: Any, directory: Path) -> str | None:
    """The text under `chat_template`, or of several by name the default's."""
    if isinstance(value, list):
        defaults = (t for t in value if isinstance(t, dict) and t.get("name") == "default")
        value = next((t.get("template") for t in defaults), None)
    if value is not None and not isinstance(value, str):
        raise JaxdynError(
            f"{directory / 'tokenizer_config.json'}: chat_template should be a text, got "
            f"{value!r:.60}"
        )
    return value


def _read_backend(path: Path) -> tokenizers.Tokenizer:
    content = read_bytes(path, 8 * SETTINGS_BYTES)
    try:
        backend = tokenizers.Tokenizer.from_buffer(content)
        backend.no_truncation()
        backend.no_padding()
        return backend
    except BaseException as error:  # the library raises bare Exceptions, and panics
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise JaxdynError(f"cannot read {path}: {one_line(error, kind=False)}") from error


def _require_tokens(settings: dict[str, Any], path: Path) -> None:
    """That what names tokens in `tokenizer_config.json` are texts, and a flag is one."""
    for role in SPECIAL:
        if not isinstance(_content(settings.get(role)), str | None):
            raise JaxdynError(f"{path}: {role} should be a text, got {shown(settings[role])}")
        require_unicode(_content(settings.get(role)) or "", f"{path}: {role}")
    if not isinstance(settings.get("add_bos_token"), bool | None):
        flag = shown(settings["add_bos_token"])
        raise JaxdynError(f"{path}: add_bos_token should be true or false, got {flag}")


def _ids(data: dict[str, Any], name: str, path: Path) -> list[int]:
    """One id or several as a list; some configs write -1 for none."""
    value = data.get(name)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for i in ids:
        if type(i) is not int or not -1 <= i < 2**31:
            raise JaxdynError(
                f"{path}: {name} should be a token's id, a whole number, or several, got {shown(i)}"
            )
    return [i for i in ids if i >= 0]


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
