"""A file in memory over Arrow Flight, as record batches of one 4 MiB binary column: FILE; prints its port."""

import struct
import sys
from pathlib import Path

import pyarrow as pa
from pyarrow import flight

from bench.memory import file_in_memory

REQUEST = struct.Struct("<QQ")
STEP_BYTES = 4 << 20
_SCHEMA = pa.schema([("data", pa.uint8())])


class Files(flight.FlightServerBase):
    """Answers tickets of offset and length."""

    def __init__(self, content: memoryview) -> None:
        super().__init__("grpc://127.0.0.1:0")
        self._content = pa.py_buffer(content)

    def do_get(self, context: flight.ServerCallContext, ticket: flight.Ticket) -> flight.RecordBatchStream:
        offset, length = REQUEST.unpack(ticket.ticket)
        batches = []
        for start in range(offset, offset + length, STEP_BYTES):
            size = min(STEP_BYTES, offset + length - start)
            column = pa.Array.from_buffers(pa.uint8(), size, [None, self._content.slice(start, size)])
            batches.append(pa.record_batch([column], schema=_SCHEMA))
        return flight.RecordBatchStream(pa.RecordBatchReader.from_batches(_SCHEMA, batches))


def connect(port: int) -> flight.FlightClient:
    """A client of the peer on this machine."""
    return flight.connect(f"grpc://127.0.0.1:{port}")


def read(client: flight.FlightClient, offset: int, into: memoryview) -> None:
    """Receive `len(into)` bytes of the file from `offset` on, into the reader's own memory."""
    received = 0
    for chunk in client.do_get(flight.Ticket(REQUEST.pack(offset, len(into)))):
        data = memoryview(chunk.data.column(0).buffers()[1]).cast("B")[: chunk.data.num_rows]
        into[received : received + len(data)] = data
        received += len(data)
    if received != len(into):
        raise ConnectionError(f"the peer sent {received} of {len(into)} bytes")


def main() -> None:
    server = Files(file_in_memory(Path(sys.argv[1])))
    print("port", server.port, flush=True)
    server.serve()


if __name__ == "__main__":
    main()
