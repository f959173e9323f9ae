"""Whole weights over HTTP against tensorizer, which is made for just that."""

from bench.measure import Pair, interleaved
from bench.registry import NotMeasurable, Row, Run, benchmark
from bench.rows.client_load import GIBIBYTE
from bench.setting import ServedBert
from support.sendfile_server import serve_folder

# Where two cores send and receive, bare sockets are not five times as fast as tensorizer (client.load.tensorizer.bare):
# then it is enough to be as close to them as client.load.raw_tcp_2 has to be.
TENSORIZER = Row(
    "client.load.tensorizer", unit="s", better="lower", goal=1 / 5, issue=4, or_else="client.load.tensorizer.of_raw_tcp"
)
OF_RAW = Row("client.load.tensorizer.of_raw_tcp", unit="s", better="lower", goal=1 / 0.75, issue=4)
BARE = Row("client.load.tensorizer.bare", unit="s", better="lower", goal=None, issue=4)


@benchmark(TENSORIZER, OF_RAW, BARE)
def tensorizer(run: Run) -> dict[str, Pair]:
    """load_state_dict, checksums checked, against TensorDeserializer of an http:// URL, hashes not checked.

    Its file comes from the page cache by sendfile; it chooses how many connections it reads by itself. Ours and the
    bare sockets have two.
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
        "ours": bert.worker("client_load", bert.address, "2", "verify"),
        "bare": bert.worker("read_raw_tcp", bert.peer("raw_tcp"), str(bert.size), "2"),
        "peer": bert.worker("client_tensorizer", bert.weights, folder / "model.tensors", f"{url}/model.tensors"),
    }
    values = interleaved({name: worker.measure for name, worker in workers.items()}, rounds=run.rounds(5))
    return {
        TENSORIZER.name: Pair(values["ours"], values["peer"]),
        OF_RAW.name: Pair(values["ours"], values["bare"]),
        BARE.name: Pair(values["bare"], values["peer"]),
    }
