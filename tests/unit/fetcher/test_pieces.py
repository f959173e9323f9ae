import random

import pytest

from modelcache_fetcher.pieces import Piece, PieceLog, PieceMap, load_pieces, log_path


@pytest.fixture
def part(tmp_path):
    path = tmp_path / "key.part"
    path.write_bytes(b"x" * 1000)
    return path


def write(part, *pieces):
    log = PieceLog(part)
    for piece in pieces:
        log.append(piece)
    log.close()


def test_what_was_logged_is_known_after_a_kill(part):
    write(part, Piece(100, 50, 7), Piece(0, 100, 8))
    write(part, Piece(500, 10, 9))
    pieces = load_pieces(part, 1000)
    assert list(pieces) == [Piece(0, 100, 8), Piece(100, 50, 7), Piece(500, 10, 9)]
    assert pieces.gaps(1000) == [(150, 500), (510, 1000)]
    assert pieces.at(100) == Piece(100, 50, 7)
    assert pieces.at(101) is None


def test_a_cut_off_or_damaged_record_is_as_good_as_absent(part):
    write(part, Piece(0, 10, 1), Piece(10, 10, 2), Piece(20, 10, 3))
    log = log_path(part)
    data = bytearray(log.read_bytes())
    data[20 + 3] ^= 1
    log.write_bytes(data[:-5])
    assert list(load_pieces(part, 1000)) == [Piece(0, 10, 1)]
    write(part, Piece(30, 10, 4))
    assert list(load_pieces(part, 1000)) == [Piece(0, 10, 1), Piece(30, 10, 4)]


def test_pieces_beyond_the_file_are_not_believed(part):
    write(part, Piece(990, 20, 1), Piece(0, 10, 1))
    assert list(load_pieces(part, 2000)) == [Piece(0, 10, 1)]
    part.unlink()
    assert list(load_pieces(part, 1000)) == []


def test_later_pieces_replace_what_they_overlap():
    generator = random.Random(1)
    for _ in range(200):
        pieces, model = PieceMap(), {}
        for number in range(30):
            start = generator.randrange(50)
            end = start + generator.randrange(1, 12)
            model = {key: span for key, span in model.items() if span[1] <= start or span[0] >= end}
            model[number] = (start, end)
            pieces.add(Piece(start, end - start, number))
        assert [(p.offset, p.end) for p in pieces] == sorted(model.values())
        covered = {i for start, end in model.values() for i in range(start, end)}
        missing = {i for start, end in pieces.gaps(64) for i in range(start, end)}
        assert covered | missing == set(range(64))
        assert not covered & missing
