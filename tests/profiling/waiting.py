import time


def wait_until(true, seconds=120):
    """What is waited for may take long on a busy machine; how long it takes is not what a test is about."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)
