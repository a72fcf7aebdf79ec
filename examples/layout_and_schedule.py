"""Read a pipeline layout, build a schedule for its stages, check it, simulate it and print it. No framework is imported.

python examples/layout_and_schedule.py
"""

from partita import Layout, LayoutError
from partita.schedule import Costs, build, check, grid, lower, simulate

PP, MICROBATCHES = 2, 4

# 6 decoder layers on 2 pipeline ranks with 2 virtual stages each. The first and the last stage have one layer fewer.
layout = Layout("Et|tt|tt|tL", PP)
vpp = layout.virtual_pipeline_model_parallel_size
print(layout.pretty_repr(), end="\n\n")
for rank in range(PP):
    print(f"rank {rank}: decoder layers", [layout.get_layer_id_list("decoder", stage, rank) for stage in range(vpp)])

# A layout that does not fit a model is an error that names every violation.
try:
    layout.validate_layer_layout(num_layers=8, mtp_num_layers=None)
except LayoutError as error:
    print(f"\n{error}\n")

# A forward costs one unit of time for each layer of the stage, and one for the loss.
layers = [layout.get_num_layers_to_build("decoder", *divmod(stage, PP)) for stage in range(layout.num_stages)]
forward = tuple(float(n) for n in (*layers[:-1], layers[-1] + 1))
costs = Costs(f=forward, b=forward, w=forward)

for kind in ("interleaved-1f1b", "zb-v"):
    schedule = build(kind, PP, MICROBATCHES, vpp)
    check(lower(schedule))  # raises ScheduleError with the place of the fault, also for a schedule of your own
    timeline = simulate(schedule, costs)
    print(f"{kind}: bubble {timeline.bubble_makespan:.1%}, micro-batches alive {timeline.peak_activations}")
    print(grid(timeline, width=120), end="\n\n")
