"""A file in memory as a bare grpcio stream of the wire's own messages: FILE; prints its port.

What any grpcio server must do for these messages of 1 MiB, and nothing else: no checks, no cache, no log.
"""

import concurrent.futures
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc

from bench.memory import file_in_memory
from modelcache_wire.v1 import weights_pb2, weights_pb2_grpc

MESSAGE_BYTES = 1 << 20


class Bare(weights_pb2_grpc.WeightsServicer):
    """Only Read."""

    def __init__(self, content: memoryview) -> None:
        self._content = content

    def Read(  # noqa: N802
        self, request: weights_pb2.ReadRequest, context: grpc.ServicerContext
    ) -> Iterator[weights_pb2.ReadResponse]:
        for wanted in request.ranges:
            end = wanted.offset + wanted.length
            for start in range(wanted.offset, end, MESSAGE_BYTES):
                yield weights_pb2.ReadResponse(data=bytes(self._content[start : min(start + MESSAGE_BYTES, end)]))


def main() -> None:
    server = grpc.server(concurrent.futures.ThreadPoolExecutor(8))
    weights_pb2_grpc.add_WeightsServicer_to_server(Bare(file_in_memory(Path(sys.argv[1]))), server)
    print("port", server.add_insecure_port("127.0.0.1:0"), flush=True)
    server.start()
    server.wait_for_termination()


if __name__ == "__main__":
    main()
