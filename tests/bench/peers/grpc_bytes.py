"""A file in memory as a grpcio stream of raw bytes: `python -m bench.peers.grpc_bytes FILE` prints its port.

Tuned: no protobuf around the bytes (the handler's and the caller's serializers give back what they get), messages of
2 MiB, large HTTP/2 frames and windows, and malloc keeps what is freed, on both ends. (Larger windows, write buffers and
the "throughput" target made no difference.)
"""

import concurrent.futures
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc

from bench.memory import file_in_memory, keep_freed_memory

REQUEST = struct.Struct("<QQ")
MESSAGE_BYTES = 2 << 20
METHOD = "/bench.Bytes/Read"
OPTIONS = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.http2.max_frame_size", 4 << 20),
    ("grpc.http2.lookahead_bytes", 4 << 20),
)


def connect(port: int) -> grpc.Channel:
    """A channel to the peer on this machine."""
    return grpc.insecure_channel(f"127.0.0.1:{port}", options=OPTIONS)


def read(channel: grpc.Channel, offset: int, into: memoryview) -> None:
    """Receive `len(into)` bytes of the file from `offset` on."""
    call = channel.unary_stream(METHOD, request_serializer=None, response_deserializer=None)
    received = 0
    for message in call(REQUEST.pack(offset, len(into))):
        into[received : received + len(message)] = message
        received += len(message)
    if received != len(into):
        raise ConnectionError(f"the peer sent {received} of {len(into)} bytes")


def main() -> None:
    keep_freed_memory()
    content = file_in_memory(Path(sys.argv[1]))

    def stream(request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        offset, length = REQUEST.unpack(request)
        for start in range(offset, offset + length, MESSAGE_BYTES):
            yield bytes(content[start : min(start + MESSAGE_BYTES, offset + length)])

    server = grpc.server(concurrent.futures.ThreadPoolExecutor(4), options=OPTIONS)
    service, method = METHOD.strip("/").split("/")
    handler = grpc.unary_stream_rpc_method_handler(stream)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
    print("port", server.add_insecure_port("127.0.0.1:0"), flush=True)
    server.start()
    server.wait_for_termination()


if __name__ == "__main__":
    main()
