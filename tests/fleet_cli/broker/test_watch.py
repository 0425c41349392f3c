from tests.support.command import Run, refused


def test_half_of_tls_is_one_sentence(fleet: Run) -> None:
    assert "--ca" in refused(fleet("broker", "watch", "--certificate", "monitor.pem"))
