"""Whole weights over HTTP against tensorizer, which is made for just that."""

from bench.measure import Pair, interleaved
from bench.registry import NotMeasurable, Row, Run, benchmark
from bench.rows.client_load import GIBIBYTE
from bench.setting import ServedBert
from support.sendfile_server import serve_folder

TENSORIZER = Row("client.load.tensorizer", unit="s", better="lower", goal=1 / 5, issue=4)


@benchmark(TENSORIZER)
def tensorizer(run: Run) -> dict[str, Pair]:
    """load_state_dict, checksums checked, against TensorDeserializer of an http:// URL, hashes not checked.

    Its file comes from the page cache by sendfile; it chooses how many connections it reads by itself.
    """
    try:
        import tensorizer  # noqa: F401
    except ImportError as error:
        raise NotMeasurable("tensorizer is not installed (pip install 'modelcache[bench]')") from error
    bert = ServedBert.serve(run, GIBIBYTE)
    folder = run.folder / "tensorizer"
    folder.mkdir()
    url, _ = run.closing.enter_context(serve_folder(folder))
    workers = {
        "ours": bert.worker("client_load", bert.address, "1", "verify"),
        "peer": bert.worker("client_tensorizer", bert.weights, folder / "model.tensors", f"{url}/model.tensors"),
    }
    values = interleaved({name: worker.measure for name, worker in workers.items()}, rounds=run.rounds(5))
    return {TENSORIZER.name: Pair(values["ours"], values["peer"])}
