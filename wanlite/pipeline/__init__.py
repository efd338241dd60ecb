"""A saved student as a diffusers pipeline: prompts -> images, in the size and the steps of its training.

    from wanlite import WanLitePipeline
    WanLitePipeline.from_pretrained("outputs/wan_t2i")(prompt).images[0]

pipeline.py has the class. The data of a call pass through arguments.py, which chooses size and steps, text.py,
denoising.py and decoding.py, and editing.py for an image that is changed; loading.py reads the components of a folder.
"""

from .decoding import are_finite as are_finite
from .pipeline import WanLitePipeline as WanLitePipeline
from .text import pack_embeddings as pack_embeddings
from .text import pad_embeddings as pad_embeddings
