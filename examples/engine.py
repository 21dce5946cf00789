"""Two subjects, two images from the same noise: plain Stable Diffusion, and Attend-and-Excite.

    python examples/engine.py

writes plain.png and guided.png to the current folder. It needs neither a GPU nor a model hub: it uses the
small model in the package, which draws coloured shapes.
"""

from aae_batch import Engine, GuidanceConfig, Request

PROMPT = "a red circle and a blue square"
SUBJECTS = ["red circle", "blue square"]

# "shapes" is the embedded model; a hub id, a folder in diffusers' layout or a URL works as well.
engine = Engine.from_pretrained("shapes", slots=2)

# The settings tuned for the embedded model; `GuidanceConfig()` has the paper's.
config = GuidanceConfig(
    num_inference_steps=30,
    guidance_scale=3.0,
    eta=1.0,
    max_iter_to_alter=15,  # guide the first 15 steps
    scale_factor=10.0,
    thresholds={0: 0.05, 3: 0.5, 6: 0.8},
    attn_res=(8, 8),
)

requests = [
    Request(PROMPT, subjects=SUBJECTS, seed=1, method="stable-diffusion", id="plain"),
    Request(PROMPT, subjects=SUBJECTS, seed=1, method="attend-and-excite", id="guided"),
]
for result in engine.generate(requests, config):
    if result.error:
        raise result.error
    result.image.save(f"{result.request.id}.png")
    attention = {seen.subject: seen.max_attention[-1] for seen in result.attention.subjects}
    print(result.request.id, *(f"{name}: {peak:.2f}" for name, peak in attention.items()))
