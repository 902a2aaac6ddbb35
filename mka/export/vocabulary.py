"""A tokenizer as GGUF files hold one: tokens, their types, merges or scores, and how text is cut before."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gguf import GGUFWriter, TokenType

from mka.errors import CheckpointError

_SPACE = "\u2581"
_SPECIAL = ("bos", "eos", "unk", "sep", "pad", "mask")
# Ways to cut text that llama.cpp names and transformers has no regular expression for: what a tokenizer's
# `pre_tokenizer` is made of -> ``tokenizer.ggml.pre``.
_CUTS = {("ByteLevel",): "gpt-2", ("Digits", "ByteLevel"): "smollm"}
# Names of regular expressions, where several have the same one: whether words that are tokens are taken whole -> name.
_NAMES = {True: ("llama-bpe", "tekken"), False: ("dbrx", "qwen2", "gpt-4o", "tekken")}


@dataclass(frozen=True)
class Vocabulary:
    """What a file says of a tokenizer, but for its special tokens.

    Attributes:
        model: ``gpt2``, byte-level BPE, or ``llama``, SentencePiece's BPE.
        tokens: one per row of the embedding.
        types: of the tokens.
        pre: how text is cut before merging; None of ``llama``, which does not cut.
        merges: of ``gpt2``: pairs, best first.
        scores: of ``llama``: one per token; the best is merged first.
        space_prefix: of ``llama``: whether text gets a space in front.
    """

    model: str
    tokens: list[str]
    types: list[TokenType]
    pre: str | None = None
    merges: list[str] | None = None
    scores: list[float] | None = None
    space_prefix: bool = False


def read_vocabulary(tokenizer: Any, rows: int, where: str) -> Vocabulary:
    """Read a tokenizer.

    Args:
        tokenizer: a fast one of transformers.
        rows: of the embedding; rows without a token are filled up.
        where: for a refusal.

    Raises:
        CheckpointError: if it is none that llama.cpp has.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    body = json.loads(backend.to_str()) if backend is not None else {}
    model = body.get("model") or {}
    if model.get("type") != "BPE":
        raise _refuse(where, f"is of kind {model.get('type')}", "BPE, on bytes or of SentencePiece")
    tokens, types = _list_tokens(body, rows, where)
    merges = [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model["merges"]]
    if model.get("byte_fallback"):
        return _read_sentencepiece(body, tokens, types, merges, where)
    pre = _name_cut(body, bool(model.get("ignore_merges")), where)
    return Vocabulary("gpt2", tokens, types, pre, merges=[f"{left} {right}" for left, right in merges])


def add_vocabulary(writer: GGUFWriter, vocabulary: Vocabulary, tokenizer: Any, stops: Sequence[int]) -> None:
    """Add a tokenizer, its special tokens and its chat templates to a file.

    Args:
        writer: of the file.
        vocabulary: as `read_vocabulary` has it.
        tokenizer: the same.
        stops: tokens that end an answer.
    """
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre or "default")
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.merges is not None:
        writer.add_token_merges(vocabulary.merges)
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(vocabulary.space_prefix)
    ids = {kind: getattr(tokenizer, f"{kind}_token_id", None) for kind in _SPECIAL}
    if ids["eos"] is None and stops:
        ids["eos"] = stops[0]
    for kind, number in ids.items():
        if number is not None and number < len(vocabulary.tokens):
            getattr(writer, f"add_{kind}_token_id")(number)
    # A file has three places for what ends an answer, and readers stop at each of them.
    for kind, number in zip(("eot", "eom"), (stop for stop in stops if stop != ids["eos"])):
        getattr(writer, f"add_{kind}_token_id")(number)
    seen = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(seen[:1] == [ids["bos"]])
    writer.add_add_eos_token(len(seen) > 1 and seen[-1] == ids["eos"])
    templates = tokenizer.chat_template
    if isinstance(templates, Mapping):
        templates = [{"name": name, "template": template} for name, template in templates.items()]
    if templates:
        writer.add_chat_template(templates)


def _refuse(where: str, what: str, allowed: str) -> CheckpointError:
    return CheckpointError(f"{where}: its tokenizer {what}, which llama.cpp has no name for; allowed: {allowed}")


def _list_tokens(body: Mapping[str, Any], rows: int, where: str) -> tuple[list[str], list[TokenType]]:
    """List the tokens by number, and their types; added ones that text holds are spelled as text has them."""
    vocabulary = {number: token for token, number in body["model"]["vocab"].items()}
    added = {entry["id"]: entry for entry in body.get("added_tokens") or ()}
    if beyond := [n for n in (*vocabulary, *added) if n >= rows and not added.get(n, {}).get("special")]:
        raise CheckpointError(f"{where}: token {min(beyond)} has no row among the embedding's {rows}")
    unknown, bytewise = body["model"].get("unk_token"), body["model"].get("byte_fallback")
    tokens, types = [], []
    for number in range(rows):
        token, kind = vocabulary.get(number), TokenType.NORMAL
        if number in added:
            token = added[number]["content"]
            kind = TokenType.CONTROL if added[number]["special"] else TokenType.USER_DEFINED
            if kind == TokenType.USER_DEFINED and bytewise:
                token = token.replace(_SPACE, " ")
        if token is None:
            token, kind = f"[PAD{number}]", TokenType.UNUSED
        elif bytewise and token == unknown:
            kind = TokenType.UNKNOWN
        elif bytewise and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            kind = TokenType.BYTE
        tokens.append(token)
        types.append(kind)
    return tokens, types


def _list_steps(step: Mapping[str, Any] | None, inner: str) -> list[Mapping[str, Any]]:
    """List what a normalizer or pre-tokenizer is made of."""
    if step is None:
        return []
    return [part for one in step[inner] for part in _list_steps(one, inner)] if step["type"] == "Sequence" else [step]


def _name_cut(body: Mapping[str, Any], whole: bool, where: str) -> str:
    """Name how a byte-level tokenizer cuts text.

    Unicode's NFC in front of it is left out: llama.cpp's tokenizers take text as it is.

    Args:
        body: the tokenizer.
        whole: whether a word that is a token is taken without merging.
        where: for a refusal.
    """
    for step in _list_steps(body.get("normalizer"), "normalizers"):
        if step["type"] != "NFC":
            raise _refuse(where, f"changes text by {step['type']}", "none, NFC")
    steps = _list_steps(body.get("pre_tokenizer"), "pretokenizers")
    kinds = tuple(step["type"] for step in steps)
    if kinds[-1:] == ("ByteLevel",) and steps[-1].get("add_prefix_space"):
        raise _refuse(where, "puts a space in front of text", "ByteLevel without add_prefix_space")
    if kinds in _CUTS and steps[-1].get("use_regex", True) and all(s.get("individual_digits", True) for s in steps):
        return _CUTS[kinds]
    if kinds == ("Split", "ByteLevel") and not steps[-1].get("use_regex", True) and _cuts_apart(steps[0]):
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

        for name in (*_NAMES[whole], *_NAMES[not whole]):
            if GGUF_PRE_TOKENIZER_SPLITS.get(name) == steps[0]["pattern"].get("Regex"):
                return name
    known = [*_CUTS.values(), *sorted({name for names in _NAMES.values() for name in names})]
    raise _refuse(where, f"cuts text by {', '.join(kinds) or 'nothing'} in a way", f"those of {', '.join(known)}")


def _cuts_apart(step: Mapping[str, Any]) -> bool:
    """Whether a split keeps what its expression matches, piece by piece."""
    return (step["behavior"], bool(step.get("invert"))) in (("Isolated", False), ("Removed", True))


def _read_sentencepiece(
    body: Mapping[str, Any],
    tokens: list[str],
    types: list[TokenType],
    merges: Sequence[Sequence[str]],
    where: str,
) -> Vocabulary:
    """Give each token the score that its first merge implies: llama.cpp merges by scores, and has no merges here."""
    steps = _list_steps(body.get("normalizer"), "normalizers") + _list_steps(body.get("pre_tokenizer"), "pretokenizers")
    spaced = any(step["type"] == "Metaspace" or step.get("content") == _SPACE for step in steps)
    if not spaced:
        raise _refuse(where, "does not write spaces as U+2581", "SentencePiece's way with spaces")
    in_front = any(
        step["type"] == "Prepend" or (step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never")
        for step in steps
    )
    scores: dict[str, float] = {}
    for left, right in merges:
        scores.setdefault(left + right, -float(len(scores) + 1))
    return Vocabulary(
        "llama", tokens, types, scores=[scores.get(token, 0.0) for token in tokens], space_prefix=in_front
    )
