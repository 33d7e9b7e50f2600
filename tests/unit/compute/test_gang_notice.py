"""A node of a gang that is about to be taken away says so to node 0, over the connection that it holds to it."""

import signal
import socket
import subprocess
import sys

NODE_0 = """
import signal, socket, sys, threading
from posttrain.compute.cluster import DONE, _hear
came = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: came.set())
with socket.create_server(("127.0.0.1", 0)) as door:
    print(door.getsockname()[1], flush=True)
    peers = [door.accept()[0] for _ in range(2)]
over = threading.Event()
hearing = threading.Thread(target=_hear, args=(peers, over), daemon=True)
hearing.start()
asked = came.wait(30)
over.set()
hearing.join()
for peer in peers:
    peer.sendall(DONE)
print("saved" if asked else "nobody said anything", flush=True)
"""
NODE = """
import socket, sys
from posttrain.compute.cluster import DONE, _leaving
with socket.create_connection(("127.0.0.1", int(sys.argv[1]))) as head:
    with _leaving(head):
        print("working", flush=True)
        print(head.recv(len(DONE)) == DONE, flush=True)
"""


def started(code: str, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_sigterm_to_every_other_node_is_one_to_node_0_and_they_work_on_until_it_is_through():
    head = started(NODE_0)
    assert head.stdout is not None
    port = head.stdout.readline().strip()
    nodes = [started(NODE, port) for _ in range(2)]
    for node in nodes:
        assert node.stdout is not None and node.stdout.readline() == "working\n"
    for node in nodes:
        node.send_signal(signal.SIGTERM)
    said, errors = head.communicate(timeout=60)
    assert said == "saved\n" and head.returncode == 0, "a second SIGTERM would have ended it: " + errors
    assert errors.count("the node at 127.0.0.1 is about to be taken away") == 1
    for node in nodes:
        out, told = node.communicate(timeout=60)
        assert (node.returncode, out) == (0, "True\n"), told
        assert "telling node 0, which saves and stops" in told


def test_the_second_sigterm_ends_a_node():
    with socket.create_server(("127.0.0.1", 0)) as door:
        node = started(NODE, str(door.getsockname()[1]))
        peer, _ = door.accept()
        assert node.stdout is not None and node.stdout.readline() == "working\n"
        node.send_signal(signal.SIGTERM)
        assert peer.recv(7, socket.MSG_WAITALL) == b"leaving"
        node.send_signal(signal.SIGTERM)
        assert node.wait(timeout=60) == -signal.SIGTERM
        node.communicate()
        peer.close()
