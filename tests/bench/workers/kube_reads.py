"""The peer of an operator's restart: a bare client that lists all ModelCaches and reads each with its children once.

A process of its own, as the operator is one: what it takes is from its start to the last answer.
"""

import asyncio
import json
import ssl
import sys

import aiohttp

AT_ONCE = 16
PAGE = 500


async def main(url: str, token: str, expected: int) -> None:
    """Read everything once, as many requests at once as the operator makes."""
    context = ssl._create_unverified_context()
    connector = aiohttp.TCPConnector(limit=2 * AT_ONCE, ssl=context)
    headers = {"Authorization": f"Bearer {token}", "Accept": "application/json"}
    async with aiohttp.ClientSession(url, connector=connector, headers=headers) as session:

        async def get(path: str) -> dict:
            async with session.get(path) as response:
                return json.loads(await response.read())

        names, more = [], ""
        while True:
            page = await get(f"/apis/modelcache.io/v1alpha1/modelcaches?limit={PAGE}&continue={more}")
            names += [(item["metadata"]["namespace"], item["metadata"]["name"]) for item in page["items"]]
            if not (more := page["metadata"].get("continue", "")):
                break
        assert len(names) == expected
        left = iter(names)

        async def work() -> None:
            for namespace, name in left:
                core, label = f"/api/v1/namespaces/{namespace}", f"labelSelector=modelcache.io/name%3D{name}"
                await get(f"/apis/modelcache.io/v1alpha1/namespaces/{namespace}/modelcaches/{name}")
                await asyncio.gather(
                    get(f"/apis/batch/v1/namespaces/{namespace}/jobs?limit={PAGE}&{label}"),
                    get(f"{core}/persistentvolumeclaims/{name}-weights"),
                    get(f"/apis/apps/v1/namespaces/{namespace}/deployments/{name}-weights"),
                    get(f"{core}/services?limit={PAGE}&{label}"),
                )

        async with asyncio.TaskGroup() as group:
            for _ in range(AT_ONCE):
                group.create_task(work())


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
