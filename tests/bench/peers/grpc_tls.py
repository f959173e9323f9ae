"""As grpc_bytes, encrypted: FILE CERTIFICATE KEY; prints its port."""

import concurrent.futures
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc

from bench.memory import file_in_memory, keep_freed_memory
from bench.peers.grpc_bytes import MESSAGE_BYTES, METHOD, OPTIONS, REQUEST


def main() -> None:
    keep_freed_memory()
    content = file_in_memory(Path(sys.argv[1]))
    certificate, key = (Path(argument).read_bytes() for argument in sys.argv[2:])

    def stream(request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        offset, length = REQUEST.unpack(request)
        for start in range(offset, offset + length, MESSAGE_BYTES):
            yield bytes(content[start : min(start + MESSAGE_BYTES, offset + length)])

    server = grpc.server(concurrent.futures.ThreadPoolExecutor(8), options=OPTIONS)
    service, method = METHOD.strip("/").split("/")
    handler = grpc.unary_stream_rpc_method_handler(stream)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
    credentials = grpc.ssl_server_credentials([(key, certificate)])
    print("port", server.add_secure_port("127.0.0.1:0", credentials), flush=True)
    server.start()
    server.wait_for_termination()


if __name__ == "__main__":
    main()
