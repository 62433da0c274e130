"""The wgpu backend: the whole model on any GPU through WebGPU (Vulkan, Metal, DirectX 12).

Nothing here imports JAX: a machine without CUDA needs NumPy, jinja2 and wgpu.

- ``adapter``: finds and describes GPUs; the one table of settings by kind of GPU
- ``device``: buffers, uploads, kernels from ``shaders/*.wgsl``, read-back
- ``mapped``, ``staging``: buffers that the host sees, and large uploads through them
- ``feed``, ``reorder``: from a file to buffers
- ``layout``: the words in which weights lie on the device
- ``weights``: uploads a model's tensors, in windows no larger than a binding
- ``plan``: what a model takes of the device's memory, before any upload
- ``buffers``: the work space, and where stages can be read in it
- ``sites``: dispatches and their grids
- ``kernels``, ``vectors``: one dispatch each; those of one token, joined to what is around them
- ``program``: the dispatches of one forward pass
- ``runner``: the ``Runner`` protocol on top
- ``ops``: single kernels on NumPy arrays, for tests

The package imports nothing by itself: to look for an adapter is not to load the runner.
"""
