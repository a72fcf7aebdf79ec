"""Find the checkpoint from which a run resumes: the newest complete one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from partita.checkpoint.manifest import check_contents, check_sizes, read_manifest
from partita.checkpoint.run_folder import RunFolder
from partita.errors import CheckpointError
from partita.ranks.agreement import Gathers, first_text
from partita.training.state import read_state


def newest_whole(
    folder: Path,
    axes: Sequence[Gathers] = (),
    rank: int = 0,
    ranks: int = 1,
    *,
    verify: bool = True,
    on_broken: Callable[[str], None] | None = None,
) -> Path:
    """The newest complete checkpoint of a run; every rank must call this, and the ranks divide the reading.

    Args:
        folder: The run's folder.
        axes: The communicators of the mesh, empty for one rank.
        rank: This rank.
        ranks: Number of ranks.
        verify: Whether all files are read and compared with the manifest, rather than only their sizes.
        on_broken: Callback, on every rank, for each newer checkpoint that is incomplete.

    Raises:
        CheckpointError: There is no complete checkpoint.
    """
    run = RunFolder(folder)
    broken = []
    for step in reversed(run.steps()):
        said = first_text(axes, _fault(run.step_folder(step), rank, ranks, verify))
        if said is None:
            return run.step_folder(step)
        broken.append(said)
        if on_broken is not None:
            on_broken(said)
    why = f" ({broken[0]})" if broken else ""
    raise CheckpointError(
        f"{folder}: holds no complete checkpoint to resume from{why}. Start without --resume, in another folder."
    )


def _fault(folder: Path, rank: int, ranks: int, verify: bool) -> str | None:
    try:
        manifest = read_manifest(folder)
        read_state(folder)
        if verify:
            check_contents(folder, manifest, rank, ranks)
        else:
            check_sizes(folder, manifest)
    except CheckpointError as error:
        return str(error)
    return None


def refuse_left_out(folder: Path, trained_then: Collection[str], trained_now: Collection[str]) -> None:
    """Raise CheckpointError if a run that resumes from `folder` would leave out tensors, by their names on disk."""
    left_out = sorted(set(trained_then) - set(trained_now))
    if left_out:
        more = f" and {len(left_out) - 1} more" if len(left_out) > 1 else ""
        raise CheckpointError(
            f"{folder}: the run trained {left_out[0]}{more}, which the model leaves out as it is loaded here. Load it with the "
            "run's layout (--layout, with an `m` for each layer of multi-token prediction) and on its engine, and freeze "
            "nothing."
        )
