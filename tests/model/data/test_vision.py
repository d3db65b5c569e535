import threading

from model.data.vision import _alone


def test_one_process_at_a_time_downloads(tmp_path):
    root = tmp_path / "data"
    entered = threading.Event()

    def other() -> None:
        with _alone(root):
            entered.set()

    with _alone(root):
        thread = threading.Thread(target=other)
        thread.start()
        assert not entered.wait(0.2)
    assert entered.wait(5)
    thread.join()
    with _alone(root):
        pass  # given back
