"""What bucket services have in common: no revisions, folders that are only prefixes, the listing as the revision."""

from modelcache_api.reasons import Reason
from modelcache_fetcher.errors import FetchError
from modelcache_fetcher.plan import Listing, SourceFile, listing_commit


def folder_prefix(prefix: str) -> str:
    """What every key below the prefix begins with: ``abc`` does not take ``abc_copy``."""
    return f"{prefix}/" if prefix else ""


def refuse_revision(revision: str | None) -> None:
    """Raises FetchError (InvalidSource) if there is one."""
    if revision:
        raise FetchError(Reason.INVALID_SOURCE, f"A bucket has no revisions; remove revision: {revision}.")


def path_below(folder: str, key: str) -> str:
    """An object's path below the folder; "" for the empty objects by which consoles mark folders."""
    path = key[len(folder) :]
    return "" if path.endswith("/") else path


def bucket_listing(bucket: str, folder: str, files: list[SourceFile]) -> Listing:
    """The listing of a folder of a bucket.

    Raises:
        FetchError: NotFound: there is no such folder.
    """
    if not files and folder:
        raise FetchError(
            Reason.NOT_FOUND,
            f"The bucket {bucket} has no objects below {folder}; name the folder that holds the model.",
        )
    return Listing("", listing_commit(files), tuple(files))
