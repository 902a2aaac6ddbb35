"""Text from outside made fit to be shown: no password, nothing that moves a cursor or turns a line around."""

import re
import unicodedata

# What stands before an address's host: who, and a password, which databases take with a slash in it. Of what follows
# the colon, a number that ends there is a port.
_LOGIN = re.compile(r"(?P<scheme>\b[A-Za-z][\w+.-]*://)(?P<user>[^\s:/?#@'\"]*):(?!\d+(?:[/?#'\"\s]|$))[^\s'\"]*@")
_TOKEN = re.compile(r"(?P<scheme>\bhttps?://)[^\s:/?#@'\"]+@")
_QUERY = re.compile(
    r"(?P<name>[?&][^\s=&#]*(?:pass|pwd|secret|token|signature|credential|api_?key)[^\s=&#]*=)[^\s&#'\"]+",
    re.IGNORECASE,
)
# Tokens of hubs, by their prefix.
_SECRET = re.compile(r"\b(?P<prefix>hf|api_org|gh[opsu])_[A-Za-z0-9]{20,}")
_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[ -/]*[0-~])")
HIDDEN = "***"
LONGEST = 480


def hide_passwords(text: str) -> str:
    """Return a text in which the passwords of all addresses are ``***``: ``http://user:***@host``; and hubs' tokens."""
    text = _SECRET.sub(rf"\g<prefix>_{HIDDEN}", text)
    text = _LOGIN.sub(rf"\g<scheme>\g<user>:{HIDDEN}@", text)
    return _QUERY.sub(rf"\g<name>{HIDDEN}", _TOKEN.sub(rf"\g<scheme>{HIDDEN}@", text))


def escape_controls(text: str, keep: str = "") -> str:
    r"""Return a text without terminal sequences, whose other control characters are spelled out: ``\x07``.

    Control characters are those of Unicode's categories Cc and Cs, and of Cf those that turn the direction of a line;
    line and paragraph separators are with them.

    Args:
        text: from anywhere.
        keep: control characters that may stay, e.g. line ends of what is laid out on several lines.
    """
    if text.isascii() and text.isprintable():
        return text
    text = _ESCAPES.sub("", text)
    return "".join(_spell(letter) if letter not in keep and _is_control(letter) else letter for letter in text)


def make_printable(text: str) -> str:
    """Return a text as one line that is safe to show: no control sequence, no password."""
    return hide_passwords(escape_controls(text))


def one_line(text: object, most: int = LONGEST) -> str:
    """Return a text as one line that is safe to show; what is too long lacks its middle."""
    line = make_printable(re.sub(r"\s*\n\s*", " ", str(text).strip()))
    if len(line) > most:
        line = f"{line[: most * 2 // 3]} … {line[len(line) + 3 - most + most * 2 // 3 :]}"
    return line if line.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)


def describe_error(error: BaseException) -> str:
    """Return an exception's class and message on one line."""
    return f"{type(error).__name__}: {one_line(error, 200) or 'no message'}"


def make_page(text: str) -> str:
    """Return a whole page or block of lines that is safe to show."""
    return hide_passwords(escape_controls(text, keep="\n\t"))


def _is_control(letter: str) -> bool:
    if unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp"):
        return True
    return unicodedata.bidirectional(letter) in ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")


def _spell(letter: str) -> str:
    return letter.encode("unicode_escape", "backslashreplace").decode("ascii")
