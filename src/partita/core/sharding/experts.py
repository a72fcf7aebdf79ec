"""Which experts of a layer each rank holds where they are distributed (`ep`)."""

from __future__ import annotations

from collections.abc import Mapping

from partita.core.mesh import Mesh
from partita.core.model.spec import ModelSpec, TensorSpec
from partita.core.sharding.cuts import ModulePlan, TensorPlan
from partita.core.sharding.split import Split
from partita.errors import PlanError


def check_experts(mesh: Mesh) -> None:
    """Raise `PlanError` for a distribution of experts that no engine computes."""
    if mesh.ep == 1 and mesh.expert_tp != mesh.tp:
        raise PlanError(
            f"etp={mesh.etp} differs from tp={mesh.tp}, but ep is 1: without ep every expert is split over all tensor "
            "ranks. Use ep, or leave etp out."
        )


def experts_of(path: str, tensors: Mapping[str, TensorSpec], mesh: Mesh) -> Split:
    """The experts of each of the ranks that hold them together.

    `tensors` are those of the module at `path`, each with a first dimension of experts.

    Raises:
        PlanError: The tensors are not those of fused experts, or there are fewer experts than ranks.
    """
    counts = {tensor.shape[0] if len(tensor.shape) > 1 else 0 for tensor in tensors.values()}
    if len(counts) != 1 or 0 in counts or not any(len(tensor.shape) == 3 for tensor in tensors.values()):
        shapes = ", ".join(f"{name} {tensor.shape}" for name, tensor in tensors.items())
        raise PlanError(
            f"{path}: ep needs tensors whose first dimension is the experts, but it holds {shapes or 'none'}. Use tp "
            "without ep."
        )
    (count,) = counts
    if count < mesh.ep:
        nearest = max(n for n in range(1, count + 1) if mesh.stage_size % n == 0)
        raise PlanError(
            f"{path}: ep={mesh.ep} needs at least {mesh.ep} experts, but there are {count}. "
            f"{f'Use ep={nearest}' if nearest > 1 else 'Leave ep out'}."
        )
    return Split.even(count, mesh.ep)


def split_experts(path: str, inner: Mapping[str, TensorPlan], experts: Split, mesh: Mesh) -> dict[str, TensorPlan]:
    """The tensors of a module whose `experts` are distributed over ep and each split over etp.

    `inner` are the same tensors as split over `etp` ranks alone.

    Raises:
        PlanError: An expert cannot be split over so many ranks.
    """
    if all(cut.split is None for cut in inner.values()):
        raise PlanError(
            f"{path}: its experts cannot each be split over etp={mesh.etp} ranks, as their inner width is less or "
            "their tensors have another form. Use etp=1."
        )
    found = {}
    for name, cut in inner.items():
        if cut.split is not None:
            found[name] = TensorPlan(name, cut.shape, 0, experts, axis="ep", inner_dim=cut.dim, inner=cut.split)
        else:
            copies = Split(experts.size, tuple(ranges for ranges in experts.by_rank for _ in range(mesh.expert_tp)))
            found[name] = TensorPlan(name, cut.shape, 0, copies, cut.partial_grad, "ep")
    return found


def why_not_alone(mesh: Mesh) -> str:
    """Why a replica cannot answer requests of its own; empty if it can."""
    if not mesh.experts_join_replicas:
        return ""
    alone = " with etp=1" if mesh.expert_tp > 1 else ""
    inside = f"ep={mesh.tp}{alone}" if mesh.tp > 1 else f"tp={mesh.ep} with ep={mesh.ep}"
    return (
        f"ep={mesh.ep} distributes experts over several replicas (dp={mesh.dp}), of which each answers requests of its own: "
        f"none can wait for the experts of another. Use {inside}, leave ep out, or generate from given prompts (`partita "
        "generate MODEL PROMPT...`, partita.torch.generate), which replicas compute together."
    )


def refuse_without_experts(spec: ModelSpec, mesh: Mesh, modules: Mapping[str, ModulePlan]) -> None:
    """Raise `PlanError` for a model without a module of fused experts."""
    if not any(module.distributed for module in modules.values()):
        raise PlanError(
            f"ep={mesh.ep} distributes experts, but no layer of the model ({spec.family}) has fused experts. Leave ep out."
        )
