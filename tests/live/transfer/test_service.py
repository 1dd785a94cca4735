"""The thread that waits on a transport's sockets."""

from threading import Event

from headrace.live.transfer.service import Service


def test_a_socket_that_was_closed_meanwhile_does_not_stop_it() -> None:
    service = Service("test")
    called = Event()
    service.write(-1, called.set)
    service.read(-1, called.set)
    alive = Event()
    service.call(alive.set)
    assert alive.wait(60) and not called.is_set()
    service.close()
