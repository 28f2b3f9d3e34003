"""A calibration that was stopped goes on to the same bytes, and takes nothing that is not its own."""

from __future__ import annotations

import hashlib
import signal
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from streamconv.calibration.kept_inputs import KeptInputs
from streamconv.calibration.layer_files import LayerFiles
from streamconv.calibration.layers import uploaded
from streamconv.calibration.need import batch_of, calibrating_need
from streamconv.calibration.passes import repeatable, repeatable_attention
from streamconv.calibration.subject import Subject
from streamconv.calibration.tensor_files import stored_in, write_tensors
from streamconv.checkpoint.reader import TensorReader
from streamconv.checkpoint.recorded import DIGESTS
from streamconv.errors import OutputError, ResourceError, Stopped
from streamconv.forward.activations import ActivationFile
from streamconv.planning.devices import Device
from streamconv.progress import StopRequest
from tests.calibration import subjects
from tests.calibration.subjects import QUICK, TOKENS, calibrated, layer_bytes, save_subject
from tests.forward.texts import numbers, words
from tests.tiny import llama_config


def subject_in(folder: Path, text: str = "text.txt") -> Subject:
    """With a residual adapter, whose factors are made and kept with each layer."""
    return subjects.subject_in(folder, text=text, feedback=replace(QUICK, residual_rank=2))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = llama_config()
    config.num_hidden_layers = 3
    folder = save_subject(tmp_path_factory.mktemp("resumed"), config)
    (folder / "other.txt").write_text(words(numbers(3000)[1000:]))
    return folder


@pytest.fixture(scope="module")
def whole(folder: Path) -> dict[str, bytes]:
    made = calibrated(subject_in(folder), folder / "whole")
    assert all(len(each.residual) == 2 for each in made.values())
    return layer_bytes(folder / "whole")


def stopped_after(folder: Path, work: Path, least: int) -> None:
    """Have a run stop when at least so many bytes are done."""
    stop = StopRequest()

    def look(done: int) -> None:
        if done >= least:
            stop.signal_number = signal.SIGTERM

    with pytest.raises(Stopped):
        calibrated(subject_in(folder), work, look, stop)


def test_stopped_in_every_layer(folder: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    size = calibrating_need(subject_in(folder)).read // 3
    for layer in range(3):
        stopped_after(folder, tmp_path, layer * size + 1)
        assert len(layer_bytes(tmp_path)) == layer
    seen: list[int] = []
    calibrated(subject_in(folder), tmp_path, seen.append)
    assert seen[0] == 2 * size
    assert layer_bytes(tmp_path) == whole


def test_killed_between_any_two_files(
    folder: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hidden states have been synced, and the layer's file is not there yet; or half of it is."""
    write = LayerFiles.write

    def killed(self: LayerFiles, number: int, results: object) -> None:
        if number == 1:
            (tmp_path / "layer-00001.partial").write_bytes(b"half")
            raise KeyboardInterrupt
        write(self, number, results)  # type: ignore[arg-type]  # passed on as it came

    with monkeypatch.context() as patched:
        patched.setattr(LayerFiles, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            calibrated(subject_in(folder), tmp_path)
    calibrated(subject_in(folder), tmp_path)
    assert layer_bytes(tmp_path) == whole


def test_a_finished_one_is_read(
    folder: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = calibrated(subject_in(folder), folder / "whole")
    monkeypatch.setattr(LayerFiles, "streams", None)
    assert calibrated(subject_in(folder), folder / "whole") == before
    left = {path.name for path in (folder / "whole").iterdir() if path.suffix != ".safetensors"}
    assert left == {"calibration.json", DIGESTS}


@pytest.mark.parametrize("other", ["text", "states", "torn states"])
def test_leftovers_of_another_run(folder: Path, whole: dict[str, bytes], tmp_path: Path, other: str) -> None:
    size = calibrating_need(subject_in(folder)).read // 3
    if other == "text":
        calibrated(subject_in(folder, text="other.txt"), tmp_path)
        assert layer_bytes(tmp_path) != whole
    else:
        stopped_after(folder, tmp_path, size)
        for path in tmp_path.glob("reference-*"):
            path.unlink() if other == "states" else path.write_bytes(b"torn")
    calibrated(subject_in(folder), tmp_path)
    assert layer_bytes(tmp_path) == whole


def test_the_callers_threads_change_nothing(folder: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        calibrated(subject_in(folder), tmp_path)
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)
    assert layer_bytes(tmp_path) == whole


def test_disk_is_what_was_planned(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[int] = []

    def look(done: int) -> None:
        del done
        used.append(sum(path.stat().st_size for path in tmp_path.iterdir()))

    need = calibrating_need(subject_in(folder))
    calibrated(subject_in(folder), tmp_path, look)
    states = 4 * TOKENS * 32 * 4
    assert states < max(used) <= need.disk
    monkeypatch.setattr("streamconv.calibration.layer_files.free_bytes", lambda _: need.disk // 2)
    with pytest.raises(ResourceError, match=r"of the calibration need .* more"):
        calibrated(subject_in(folder, text="other.txt"), tmp_path)


def test_hidden_states_in_a_file(tmp_path: Path) -> None:
    states = torch.randn(5, 3, 4)
    with ActivationFile(tmp_path / "a", (5, 3, 4)) as file:
        file.write(slice(0, 2), states[:2])
        file.write(slice(2, 9), states[2:])
        file.sync()
    with ActivationFile(tmp_path / "a", (5, 3, 4)) as file:
        assert torch.equal(file.read(slice(1, 4)), states[1:4])
        assert torch.equal(file.read(slice(4, 8)), states[4:])


def test_inputs_that_were_not_kept_are_computed_again(
    folder: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(KeptInputs, "read", lambda *_: None)
    calibrated(subject_in(folder), tmp_path)
    assert layer_bytes(tmp_path) == whole


def test_original_weights_are_uploaded_once_a_group(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many batches the text has, where what enters the reference's groups is computed again."""
    uploads: list[int] = []

    def counted(weights: Mapping[str, torch.Tensor], device: torch.device) -> Mapping[str, torch.Tensor]:
        uploads.append(len(weights))
        return uploaded(weights, device)

    monkeypatch.setattr(KeptInputs, "read", lambda *_: None)
    monkeypatch.setattr("streamconv.calibration.need.BATCH_TOKENS", TOKENS // 4)
    monkeypatch.setattr("streamconv.calibration.layers.uploaded", counted)
    assert TOKENS // subjects.LENGTH // batch_of(subjects.LENGTH) == 4
    calibrated(subject_in(folder), tmp_path)
    assert uploads == 3 * [0, 3, 4, 6]  # before q k v; o; gate up; down


def test_a_gpu_computes_by_deterministic_algorithms(monkeypatch: pytest.MonkeyPatch) -> None:
    """And is left as the process had it. Nothing is told a CPU, where results are the same anyway."""
    can_be_fused: Callable[[], bool] = torch.backends.cuda.mem_efficient_sdp_enabled
    for device, expected in ((Device("cuda:0", "a card"), True), (Device("cpu", "CPU"), False)):
        with repeatable(1, device), repeatable_attention(device):
            assert torch.are_deterministic_algorithms_enabled() is expected
            assert can_be_fused() is not expected
        assert not torch.are_deterministic_algorithms_enabled()
        assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
        assert can_be_fused()


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1], [0, 2, 1]])
def test_hidden_states_are_hashed_as_they_lie_in_their_file(tmp_path: Path, order: list[int]) -> None:
    states, path = torch.randn(5, 3, 4), tmp_path / "a"
    chosen = [slice(0, 2), slice(2, 4), slice(4, 6)]
    with ActivationFile(path, (5, 3, 4), hashes=True) as file:
        for _ in range(2):  # of another layer, in the same file
            for each in order:
                file.write(chosen[each], states[chosen[each]])
            assert file.sync() == hashlib.sha256(path.read_bytes()).hexdigest()
            states = torch.randn(5, 3, 4)


def test_hidden_states_that_are_cut_short_while_in_use(tmp_path: Path) -> None:
    with ActivationFile(tmp_path / "a", (5, 3, 4)) as file:
        (tmp_path / "a").write_bytes(b"cut")
        with pytest.raises(OutputError, match="ended at byte 3 of 240 while it was in use; run again"):
            file.read(slice(0, 2))


def test_a_layer_before_the_last_is_done_again_from_what_enters_it(
    folder: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    """What entered it is there until the next one writes; without that, all begins anew."""
    size = calibrating_need(subject_in(folder)).read // 3
    for layer, begins in ((1, 1), (0, 0)):
        work = tmp_path / str(layer)
        stopped_after(folder, work, 2 * size)
        path = work / f"layer-{layer:05}.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"?")
        seen: list[int] = []
        calibrated(subject_in(folder), work, seen.append)
        assert seen[0] == begins * size
        assert layer_bytes(work) == whole


def test_a_file_of_its_own_that_cannot_be_read_is_the_outputs(tmp_path: Path) -> None:
    """No input is to be changed then, so it is no input's error."""
    path = tmp_path / "layer-00000.safetensors"
    write_tensors(path, {"a": torch.ones(1000)})
    stored, _ = stored_in(path)
    path.write_bytes(path.read_bytes()[:-4])
    with (
        TensorReader() as reader,
        pytest.raises(OutputError, match=rf"^{tmp_path}: {path.name} changed while"),
    ):
        reader.load(stored["a"])
    path.unlink()
    with pytest.raises(OutputError, match=rf"^{tmp_path}: .*{path.name} is missing; check the disk"):
        stored_in(path)
