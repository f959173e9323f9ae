"""The operator asks pods on their status port: with the real server and the real progress of a fetch."""

import asyncio
import socket

from modelcache_fetcher.progress import Progress
from modelcache_fetcher.progress_server import ProgressServer
from modelcache_operator.asking import NO_ANSWER, Pods
from modelcache_operator.resources.names import COMPONENT_LABEL
from modelcache_server import Server, ServerSettings
from support.server_volume import HOST, MIB, make_volume, random_bytes, wait_until


def pod(component):
    return {
        "metadata": {"labels": {COMPONENT_LABEL: component}},
        "status": {"phase": "Running", "podIP": HOST, "conditions": [{"type": "Ready", "status": "True"}]},
    }


def ask(port, question, *pods, timeout=5.0):
    async def asking():
        asked = Pods(timeout=timeout, port=port)
        try:
            return await getattr(asked, question)(pods)
        finally:
            await asked.close()

    return asyncio.run(asking())


def test_servers_tell_the_digest_that_they_announce_and_the_next_one_after_a_change(tmp_path):
    _, first = make_volume(tmp_path / "v", {"a.bin": random_bytes(MIB, 1)})
    settings = ServerSettings(tmp_path / "v", name="m", host=HOST, grpc_port=0, http_port=0, status_port=0)
    server = Server(settings)
    addresses = server.start()
    try:
        assert server.wait_ready(20)
        port = addresses.status
        assert ask(port, "announced", pod("server")) == {first.digest}
        _, second = make_volume(tmp_path / "v", {"a.bin": random_bytes(MIB, 2)})
        wait_until(lambda: ask(port, "announced", pod("server")) == {second.digest}, "the new digest is not announced")
        assert ask(port, "progress", pod("server")) is None
    finally:
        server.stop(0)
    assert ask(port, "announced", pod("server")) is None, "no answer is no harm"


def test_a_server_that_does_not_answer_in_time_is_not_taken_for_one_that_is_not_there():
    with socket.create_server((HOST, 0)) as listening:
        port = listening.getsockname()[1]
        assert ask(port, "announced", pod("server"), timeout=0.3) == {NO_ANSWER}
        assert ask(port, "progress", pod("fetch"), timeout=0.3) is None, "only progress is missing"
    assert ask(port, "announced", pod("server"), timeout=0.3) is None


def test_a_running_fetch_tells_its_progress():
    progress = Progress()
    progress.begin("fetching", total_bytes=1000, files=1)
    progress.found(250)
    server = ProgressServer(progress, 0)
    server.start()
    try:
        said = ask(server.port, "progress", pod("server"), pod("fetch"))
    finally:
        server.stop()
    assert (said["bytes"], said["totalBytes"]) == (250, 1000)
