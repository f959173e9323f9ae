"""The part of the Hugging Face Hub's HTTP API that reading needs: programs built on huggingface_hub work unchanged.

https://huggingface.co/docs/hub/api. Which headers and codes its clients rely on was measured on four generations of
huggingface_hub. Nothing is passed on to another hub, and no answer says that a file could be had by Xet.
"""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any
from urllib.parse import parse_qs

from modelcache_server.catalog import Catalog
from modelcache_server.errors import Reason, RequestError
from modelcache_server.file_reply import Headers, file_reply
from modelcache_server.http_connection import Reply, error_reply
from modelcache_server.http_message import Request
from modelcache_server.hub_revisions import HubRevision, HubRevisions, hub_repo_ids
from modelcache_server.routes import Authorize, read_only

INVALID_CREDENTIALS = "Invalid credentials in Authorization header"
"""The one text with which huggingface_hub takes a 401 over https for what it is, and not for a missing repo."""

_MAX_ASKED_BYTES = 256 * 1024  # the Hub takes 1,000 paths at once
_FORM = "application/x-www-form-urlencoded"
_JSON = "application/json"
_OTHER_KINDS = ("datasets", "spaces")
_KINDS_OF_REFS = {"refs/pr/": "pullRequests", "refs/convert/": "converts", "refs/tags/": "tags", "refs/": "branches"}


class HubRoutes:
    """Model info, tree, paths-info, refs and files of the one model that is served, and of no other."""

    def __init__(self, catalog: Catalog, authorize: Authorize, *, private: bool, https: bool) -> None:
        """`private` says that answers are for their receiver only and no proxy may keep them."""
        self._catalog = catalog
        self._https = https
        self._authorize = authorize
        self._revisions = HubRevisions(catalog)
        self._scope = "private" if private else "public"

    def __call__(self, request: Request, client: str) -> Reply:
        """Answer a request."""
        del client
        try:
            self._authorize(request.headers.get("authorization"))
        except RequestError as error:
            return _refusal(error, https=self._https or "https" in request.headers.get("x-forwarded-proto", ""))
        # Some clients write the endpoint with a slash at its end.
        segments = [segment for segment in request.segments() if segment]
        match segments:
            case ["api", "models", _, *_] if request.method == "POST":
                return self._post(request, segments[2:])
            case _ if request.method not in {"GET", "HEAD"}:
                return read_only()
            case ["api", "models", _, *_]:
                return self._api(request, segments[2:])
            case ["api", kind, _, *_] if kind in _OTHER_KINDS:
                raise RequestError(Reason.UNKNOWN_REPO, f"This server has a model and no {kind}.")
            case ["api", *_]:
                return _no_such_page()
            case [_, "resolve", _, *_] | [_, _, "resolve", _, *_]:
                return self._resolve(request, segments)
            case [kind, _, *_] if kind in _OTHER_KINDS:
                raise RequestError(Reason.UNKNOWN_REPO, f"This server has a model and no {kind}.")
            case _:
                repo = hub_repo_ids(self._catalog.active())[0]
                raise RequestError(Reason.NO_SUCH_FILE, f"Files are at /{repo}/resolve/REVISION/PATH.")

    def _resolve(self, request: Request, segments: list[str]) -> Reply:
        repo, (_, *rest) = self._revisions.split(segments)
        ref, path = self._revisions.split_revision(repo, rest)
        revision = self._pinned(repo, ref)
        file = revision.listing.files.get("/".join(path))
        if file is None:
            return _no_such_entry(repo, revision, "/".join(path))
        more = (self._cache_control(revision), *_commit_header(revision))
        wanted = request.headers.get("range")
        # A server may answer several ranges with the whole file, and clients expect that of this API.
        return file_reply(request, file.served, file.etag, more, None if wanted and "," in wanted else wanted)

    def _pinned(self, repo: str, ref: str) -> HubRevision:
        """A revision, kept for a while: who asks about it will ask for its files next."""
        revision = self._revisions.resolve(repo, ref)
        self._catalog.renew_lease(revision.digest)
        return revision

    def _api(self, request: Request, segments: list[str]) -> Reply:
        query = parse_qs(request.query)
        repo, rest = self._revisions.split(segments)
        match rest:
            case []:
                return self._info(repo, "main", query)
            case ["revision", _, *_]:
                ref, more = self._revisions.split_revision(repo, rest[1:])
                return _no_such_page() if more else self._info(repo, ref, query)
            case ["tree", _, *_]:
                ref, folder = self._revisions.split_revision(repo, rest[1:])
                return self._tree(repo, ref, "/".join(folder), recursive=_is_true(query, "recursive"))
            case ["refs"]:
                return self._refs(repo)
            case ["auth-check"]:  # who is not allowed was told so already
                return self._json({}, None)
            case ["auth-check", "write"]:
                raise RequestError(Reason.PERMISSION_DENIED, "Nobody may write: this server is read-only.")
            case _:
                return _no_such_page()

    def _post(self, request: Request, segments: list[str]) -> Reply:
        """The one question that is asked by POST; all other POSTs would write."""
        repo, rest = self._revisions.split(segments)
        if rest[:1] != ["paths-info"] or len(rest) == 1:
            return read_only()
        ref, more = self._revisions.split_revision(repo, rest[1:])
        return _no_such_page() if more else self._paths_info(request, repo, ref)

    def _info(self, repo: str, ref: str, query: Mapping[str, list[str]]) -> Reply:
        revision = self._pinned(repo, ref)
        blobs = _is_true(query, "blobs")
        info = {
            "id": repo,
            "modelId": repo,
            "author": repo.rpartition("/")[0] or None,
            "sha": revision.commit,
            "private": False,
            "gated": False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "siblings": [file.sibling(blobs=blobs) for file in revision.listing.files.values()],
        }
        if revision.published_at:
            moment = datetime.fromtimestamp(revision.published_at, UTC)
            info["lastModified"] = moment.strftime("%Y-%m-%dT%H:%M:%S.000Z")
        return self._json(info, revision)

    def _tree(self, repo: str, ref: str, folder: str, *, recursive: bool) -> Reply:
        revision = self._pinned(repo, ref)
        entries = revision.listing.tree(folder, recursive=recursive)
        return _no_such_entry(repo, revision, folder) if entries is None else self._json(entries, revision)

    def _paths_info(self, request: Request, repo: str, ref: str) -> Reply:
        revision = self._pinned(repo, ref)
        paths = dict.fromkeys(path.strip("/") for path in _asked_paths(request))
        entries = [entry for path in paths if (entry := revision.listing.entry(path)) is not None]
        return self._json(entries, revision)

    def _refs(self, repo: str) -> Reply:
        lists: dict[str, list[dict[str, str]]] = {kind: [] for kind in ("branches", *_KINDS_OF_REFS.values())}
        refs, commit = self._revisions.refs(repo)
        for ref in refs:
            kind = next(kind for prefix, kind in _KINDS_OF_REFS.items() if ref.ref.startswith(prefix))
            lists[kind].append({"name": ref.name, "ref": ref.ref, "targetCommit": commit})
        return self._json(lists, None)

    def _json(self, value: Any, revision: HubRevision | None) -> Reply:
        headers = (
            ("Content-Type", "application/json; charset=utf-8"),
            self._cache_control(revision),
            *(_commit_header(revision) if revision is not None else ()),
        )
        return Reply(200, headers, json.dumps(value, separators=(",", ":")).encode())

    def _cache_control(self, revision: HubRevision | None) -> tuple[str, str]:
        immutable = revision is not None and revision.pinned
        how = "max-age=31536000, immutable" if immutable else "no-cache"
        return "Cache-Control", f"{self._scope}, {how}"


def _refusal(error: RequestError, *, https: bool) -> Reply:
    """Who is not authenticated, or not allowed, in the words from which clients make the right exception."""
    reply = error_reply(error)
    if error.reason is Reason.UNAUTHENTICATED and https:
        return _with_headers(reply, {"X-Error-Message": INVALID_CREDENTIALS})
    if error.reason is Reason.PERMISSION_DENIED:
        return _with_headers(reply, {"X-Error-Code": "GatedRepo"})
    return reply


def _with_headers(reply: Reply, changed: Mapping[str, str]) -> Reply:
    kept = tuple(header for header in reply.headers if header[0] not in changed)
    return Reply(reply.status, (*kept, *changed.items()), reply.body, reply.error)


def _no_such_entry(repo: str, revision: HubRevision, path: str) -> Reply:
    """With the commit: clients then remember that it has no such file, and ask no more."""
    error = RequestError(
        Reason.NO_SUCH_FILE,
        f"{repo} at {revision.commit[:12]} has no {path[:200]!a} here: the source lacks it, or patterns leave it out.",
    )
    reply = error_reply(error)
    return Reply(reply.status, (*reply.headers, *_commit_header(revision)), reply.body, reply.error)


def _no_such_page() -> Reply:
    """Without an X-Error-Code: what is missing is the page, not a repo, revision or file."""
    return Reply(404, (("Content-Type", "text/plain"),), b"this server has no such page\n", "NO_SUCH_PAGE")


def _commit_header(revision: HubRevision) -> Headers:
    return (("X-Repo-Commit", revision.commit),)


def _is_true(query: Mapping[str, list[str]], name: str) -> bool:
    return query.get(name, [""])[-1].lower() in {"true", "1"}


def _asked_paths(request: Request) -> list[str]:
    """The paths of a paths-info request: a form as huggingface_hub sends it, or JSON as @huggingface/hub does.

    Raises:
        RequestError: INVALID_REQUEST.
        BodyWanted, BadRequest: as `Request.content`.
    """
    problem = RequestError(
        Reason.INVALID_REQUEST, f"The body must be a form ({_FORM}) or a JSON object ({_JSON}) with paths."
    )
    kind = request.headers.get("content-type", _FORM).partition(";")[0].strip().lower()
    if kind not in {_FORM, _JSON}:
        raise problem
    try:
        text = request.content(_MAX_ASKED_BYTES).decode()
        if kind == _FORM:
            fields = parse_qs(text, strict_parsing=True, max_num_fields=10_000) if text else {}
            return fields.get("paths", [])
        document = json.loads(text)
    except (ValueError, RecursionError):
        raise problem from None
    paths = document.get("paths") if isinstance(document, dict) else None
    if isinstance(paths, str):
        return [paths]
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        raise problem
    return paths
