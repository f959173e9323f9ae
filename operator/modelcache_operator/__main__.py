"""`modelcache-operator`: waits for leadership, then watches and reconciles until it is told to stop."""

import argparse
import asyncio
import gc
import logging
import os
import signal
import sys
import uuid
from collections.abc import Coroutine
from typing import Any

import kopf
from kubernetes.aio.client import Configuration

from modelcache_operator import children, handlers, logs, metrics, rights
from modelcache_operator.asking import Pods
from modelcache_operator.children import Children
from modelcache_operator.controller import Controller
from modelcache_operator.errors import ApiError, ApiUnreachable, LeadershipLost, OperatorError
from modelcache_operator.kube import MODEL_CACHES, Kube, load_configuration
from modelcache_operator.lease import Election
from modelcache_operator.metrics import Metrics
from modelcache_operator.reading import Reader
from modelcache_operator.settings import Settings, from_environment

log = logging.getLogger("modelcache_operator")

SIGNALS = (signal.SIGTERM, signal.SIGINT)


def main(arguments: list[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    parser = argparse.ArgumentParser(prog="modelcache-operator", description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether this account may do what is needed")
    options = parser.parse_args(arguments)
    try:
        settings = from_environment()
    except OperatorError as error:
        sys.stderr.write(f"modelcache-operator: {error}\n")
        return 2
    logs.configure(settings.log_level)
    _collect_garbage_rarely()
    try:
        if options.check:
            return asyncio.run(check(settings))
        asyncio.run(run(settings))
    except LeadershipLost as error:
        # another replica may act already: nothing may be finished first
        log.error("stopped at once: %s", error)  # noqa: TRY400 - the sentence says it all
        logging.shutdown()
        os._exit(1)
    except OperatorError as error:
        log.error("stopped: %s", error)  # noqa: TRY400
        return 1
    return 0


def _collect_garbage_rarely() -> None:
    """Spare the collector what is imported, and most of its runs: a restart makes few cycles and very many objects."""
    gc.freeze()
    gc.set_threshold(50_000)


async def run(settings: Settings) -> None:
    """Lead, and do the operator's work while leading.

    Raises:
        LeadershipLost: Stop at once.
        OperatorError: The cluster lacks the CRD, or nothing can be read.
    """
    stop = asyncio.Event()
    _stop_on_signals(stop)
    shown = Metrics()
    alive = {"ok": True}
    runner = await metrics.serve(shown, settings.metrics_port, lambda: alive["ok"])
    configuration = await load_configuration()
    streams = len(children.KINDS) * max(1, len(settings.namespaces))
    kube = Kube(configuration, connections=settings.workers * 2 + streams)
    pods = Pods()
    try:
        await _first_of(stop, _wait_for_api(kube, settings))
        if stop.is_set():
            return
        if not settings.lease_name:
            await _lead(settings, configuration, kube, pods, shown, stop)
            return
        identity = f"{settings.identity}_{uuid.uuid4().hex[:8]}"
        election = Election(kube, settings.operator_namespace, settings.lease_name, identity)
        await _first_of(stop, election.acquire())
        if stop.is_set():
            return
        log.info("leading as %s", identity)
        holding = asyncio.create_task(election.hold())
        try:
            await _lead(settings, configuration, kube, pods, shown, stop, holding)
        finally:
            lost = holding.done()
            holding.cancel()
            await asyncio.gather(holding, return_exceptions=True)
            if not lost:
                await election.release()
    finally:
        alive["ok"] = False
        await pods.close()
        await kube.__aexit__(None, None, None)
        await runner.cleanup()


async def check(settings: Settings) -> int:
    """Print what is missing or too much in this account's rights; returns the exit code."""
    async with Kube(await load_configuration()) as kube:
        await _wait_for_api(kube, settings)
        problems = await rights.problems(kube, settings)
    for problem in problems:
        sys.stderr.write(f"{problem}\n")
    if not problems:
        sys.stdout.write("the CRD is installed, and this account may do what the operator needs and read no Secrets\n")
    return 1 if problems else 0


async def _lead(
    settings: Settings,
    configuration: Configuration,
    kube: Kube,
    pods: Pods,
    shown: Metrics,
    stop: asyncio.Event,
    holding: asyncio.Task[None] | None = None,
) -> None:
    """Watch and reconcile until told to stop, until leadership is lost, or until kopf ends by itself."""
    controller = Controller(kube, Reader(kube, pods), settings, shown)
    shown.observe(lambda: len(controller.queue), lambda: kube.calls)
    shown.leading.set(1)
    around = Children(kube, controller.queue, controller.news, settings.namespaces)

    async def work() -> None:
        await around.placed.wait()  # a change of what is read earlier could go unnoticed
        await controller.work()

    # before kopf: it cancels what is younger than itself
    following = asyncio.create_task(around.follow())
    workers = [asyncio.create_task(work()) for _ in range(settings.workers)]
    stopping = asyncio.create_task(stop.wait())
    kopf_stop, kopf_ready = asyncio.Event(), asyncio.Event()
    kopf_settings = handlers.operator_settings()
    kopf_identity: Any = settings.identity
    watching = asyncio.create_task(
        kopf.operator(
            registry=handlers.registry(controller.queue, controller.news, configuration),
            settings=kopf_settings,
            # or kopf asks for the user's name, which a numeric user in a container has not
            identity=kopf_identity,
            standalone=True,
            clusterwide=not settings.namespaces,
            namespaces=settings.namespaces,
            stop_flag=kopf_stop,
            ready_flag=kopf_ready,
        )
    )
    reclaiming = asyncio.create_task(_reclaim_signals(kopf_ready, stop))
    ends: list[asyncio.Task[Any]] = [stopping, watching, following, *([holding] if holding is not None else [])]
    try:
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        if holding is not None and holding.done():
            holding.result()  # raises LeadershipLost
        for task in (watching, following):
            if task.done():
                task.result()
                raise OperatorError("a watch ended by itself")
    finally:
        shown.leading.set(0)
        await _cancel(*workers, following, stopping, reclaiming)
        controller.queue.close()
        kopf_stop.set()
        if not (holding is not None and holding.done()):
            await asyncio.wait([watching], timeout=10)


async def _wait_for_api(kube: Kube, settings: Settings) -> None:
    """Wait until the API server answers; a missing CRD or right is an error that a restart will see mended."""
    while True:
        try:
            for namespace in settings.namespaces or (None,):
                await kube.version(MODEL_CACHES, namespace)
        except ApiUnreachable as error:
            log.warning("waiting for the API server: %s", error)
            await asyncio.sleep(2)
        except ApiError as error:
            if error.status == 404:
                raise OperatorError(
                    "the CustomResourceDefinition modelcaches.modelcache.io is not installed; apply "
                    "crds/modelcaches.yaml or set crds.enabled in the chart"
                ) from error
            raise
        else:
            return


async def _first_of(stop: asyncio.Event, work: Coroutine[Any, Any, None]) -> None:
    """Wait for work or for the stop, whichever is first; an error of the work is raised."""
    working = asyncio.create_task(work)
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait([working, stopping], return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
    finally:
        await _cancel(working, stopping)


async def _reclaim_signals(ready: asyncio.Event, stop: asyncio.Event) -> None:
    """Kopf takes the signals when it starts, and would need five seconds for its own way of stopping."""
    await ready.wait()
    _stop_on_signals(stop)


def _stop_on_signals(stop: asyncio.Event) -> None:
    loop = asyncio.get_running_loop()
    for number in SIGNALS:
        loop.add_signal_handler(number, stop.set)


async def _cancel(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


if __name__ == "__main__":
    sys.exit(main())
