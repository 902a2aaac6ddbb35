"""A page sent to a hub: made or found there, uploaded in one commit, compared by digest, and only then tagged."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mka.errors import PublishError
from mka.export.page import HubPage
from mka.outside.printable import HIDDEN, one_line

if TYPE_CHECKING:
    from huggingface_hub import HfApi

MAIN = "main"
# Files of a repository that are the hub's own.
_OWN = {".gitattributes"}
_REF = re.compile(r"(?!.*(?:\.\.|//|\.lock$|[/.]$))[A-Za-z0-9][\w./-]*", re.ASCII)
# A token is refused, or may not do this; what to do about each.
_REFUSALS = {
    401: "the hub does not take the token; set HF_TOKEN to one that is valid, or log in with `hf auth login`",
    403: "the token may not write there; give one with write permission, or publish to a name of your own",
    404: "there is no such repository for this token; check the name, or give a token that may see it",
    409: "somebody else is changing the repository; wait for them",
    412: "somebody else changed the repository meanwhile; look at what they did",
    413: "a file is larger than the hub takes; write smaller shards",
    429: "the hub has had too many requests of this account; wait a while",
}
_AGAIN = "then run the same command again: what has arrived is not sent twice"


@dataclass(frozen=True)
class Published:
    """What a hub holds now.

    Attributes:
        url: of the page.
        commits: branch -> its commit.
        tag: the tag, if one was asked for.
        files: of the page.
        nbytes: their bytes.
        sent: whether anything was new there.
    """

    url: str
    commits: Mapping[str, str]
    tag: str | None
    files: int
    nbytes: int
    sent: bool


def check_ref(name: str, option: str) -> None:
    """Refuse a name that no branch or tag can have.

    Raises:
        PublishError: if it is none.
    """
    if not _REF.fullmatch(name):
        raise PublishError(f"{option} {name!r} cannot be a branch or tag; allowed: letters, digits and . _ - /")


def publish_page(
    page: HubPage,
    *,
    branches: Sequence[str] = (MAIN,),
    tag: str | None = None,
    private: bool = False,
    message: str = "Publish with mka",
) -> Published:
    """Upload a page and set a tag once the hub holds exactly its files.

    A branch becomes the page: what it held beside is removed in the same commit. A branch that holds the page already
    gets no commit. Where anything fails no tag is set, and the same call goes on.

    Args:
        page: what is published.
        branches: are made where they are missing.
        tag: name of the tag; one that is there is never moved.
        private: the repository is made private; one that is there has to be.
        message: of the commit.

    Raises:
        PublishError: if the hub refuses, cannot be reached, fails, or holds anything else afterwards.
    """
    from huggingface_hub import HfApi, get_token

    if (token := get_token()) is None:
        raise PublishError(
            f"{page.repo} cannot be published without a token: set HF_TOKEN to one with write permission, or log in "
            "with `hf auth login`"
        )
    api = HfApi(token=token)
    with _explained(page.repo, token):
        url = str(api.create_repo(page.repo, private=private or None, exist_ok=True))
        if private and not api.repo_info(page.repo).private:
            raise PublishError(
                f"{page.repo} is there and public; make it private on the hub first, or leave --private out"
            )
        refs = api.list_repo_refs(page.repo)
        heads = {ref.name: ref.target_commit for ref in refs.branches}
        tagged = tag in {ref.name for ref in refs.tags}
        if tagged and (found := _differ(api, page, str(tag))):
            raise PublishError(
                f"{page.repo} has a tag {tag} already, of something else: {found}; tags are not moved, choose another"
            )
        commits = {branch: _write_branch(api, page, branch, heads.get(branch), message) for branch in branches}
        if tag is not None and not tagged:
            api.create_tag(page.repo, tag=tag, revision=commits[branches[0]], tag_message=message)
    sent = any(commit != heads.get(branch) for branch, commit in commits.items())
    return Published(url, commits, tag, len(page.files), page.nbytes, sent)


def _write_branch(api: "HfApi", page: HubPage, branch: str, head: str | None, message: str) -> str:
    """Make a branch the page, unless it is; return its commit once it was compared.

    Raises:
        PublishError: if it is anything else afterwards.
    """
    if head is None:
        api.create_branch(page.repo, branch=branch, exist_ok=True)
        head = str(api.repo_info(page.repo, revision=branch).sha)
    if not _differ(api, page, head):
        return head
    head = _commit(api, page, branch, head, message)
    if found := _differ(api, page, head):
        raise PublishError(
            f"{page.repo} holds something else on {branch} than was sent: {found}; no tag was set, run the same "
            "command again"
        )
    return head


def _commit(api: "HfApi", page: HubPage, branch: str, parent: str, message: str) -> str:
    """Put the page on a branch, and nothing beside it, in one commit; return the commit."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    operations: list[Any] = [CommitOperationAdd(name, file.source) for name, file in page.files.items()]
    stale = _list_held(api, page.repo, branch).keys() - page.files.keys() - _OWN
    operations += [CommitOperationDelete(name, is_folder=False) for name in sorted(stale)]
    made = api.create_commit(page.repo, operations, commit_message=message, revision=branch, parent_commit=parent)
    return str(made.oid)


def _list_held(api: "HfApi", repo: str, revision: str) -> dict[str, Any]:
    from huggingface_hub.hf_api import RepoFile

    entries = api.list_repo_tree(repo, recursive=True, revision=revision)
    return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}


def _differ(api: "HfApi", page: HubPage, revision: str) -> str:
    """Say how a revision differs from a page, by the digests that the hub names its files by; empty if it does not."""
    held = _list_held(api, page.repo, revision)
    found = []
    for name, file in page.files.items():
        if (entry := held.get(name)) is None:
            found.append(f"{name} is missing")
        elif entry.size != file.size or (
            entry.lfs.sha256 != file.sha256 if entry.lfs else entry.blob_id != file.git_oid()
        ):
            found.append(f"{name} has another digest")
    found += [f"{name} is left over" for name in sorted(held.keys() - page.files.keys() - _OWN)]
    return f"{found[0]}{f' ({len(found)} files differ)' if len(found) > 1 else ''}" if found else ""


@contextmanager
def _explained(repo: str, token: str) -> Iterator[None]:
    """Turn whatever the hub's client raises into one line that says what to do, without the token."""
    import httpx2

    try:
        yield
    except PublishError:
        raise
    except (httpx2.HTTPError, OSError, RuntimeError, ValueError) as error:
        first: BaseException = error
        while first.__cause__ is not None and not hasattr(first, "server_message"):
            first = first.__cause__
        what, told = _explain(first), "" if first is error else f" ({one_line(error, 120)})"
        line = f"{repo} was not published: {what}{told}; no tag was set"
        raise PublishError(line.replace(token, HIDDEN)) from None


def _explain(error: BaseException) -> str:
    from huggingface_hub.errors import OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set; unset it"
    if (response := getattr(error, "response", None)) is not None:
        code, said = response.status_code, getattr(error, "server_message", None)
        shown = f"{code}: {one_line(said, 120)}" if said else str(code)
        if code in _REFUSALS:
            return f"{_REFUSALS[code]} ({shown}); {_AGAIN}"
        if code >= 500:
            return f"the hub failed ({shown}); wait a while, {_AGAIN}"
        return f"the hub refused it ({shown})"
    if isinstance(error, ValueError):
        return f"the hub's client refused it ({one_line(error, 200)})"
    reason = one_line(error, 120) or type(error).__name__
    return f"the hub cannot be reached, or went away ({reason}); see that it answers, {_AGAIN}"
