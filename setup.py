from pathlib import Path

from setuptools import find_packages, setup

# An extra, for Triton has no wheels outside Linux, is large, and is needed on a GPU only, where torch's CUDA wheels bring the one
# they go with: 3.6.0 with torch 2.11, 3.7.1 with 2.13, 3.9.0 with 2.15. The bound below takes any that they pin.
TRITON = "triton>=3.6; platform_system == 'Linux'"

setup(
    name="mtp-kernels",
    version="0.1.0",
    description="Multi-token prediction with mask tokens: several tokens per step, and exactly the model's own text",
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    packages=find_packages(include=["mtp_kernels*", "mtp_model*"]),
    package_data={"mtp_model.demo": ["base/*", "adapter/*", "ablation/*/*", "heldout.jsonl"]},
    # Tried on torch 2.13.0 (CPU) with triton 3.7.1, on 2.15.0 with triton 3.9.0, and on 2.11.0 with triton 3.6.0 (under numpy 2.4 its interpreter cannot
    # run loops over run-time values; the kernels compile). The other lower bounds with torch 2.13.0; transformers 5.17.0 and 5.23.0 and numpy 2.4 too.
    install_requires=["torch>=2.11", "numpy>=1.26", "safetensors>=0.5", "tqdm>=4.66", "transformers>=5.0,<6"],
    extras_require={
        "parquet": ["pyarrow>=15"],
        "plot": ["matplotlib>=3.8"],
        "triton": [TRITON],
        "test": ["pytest>=8", "pytest-benchmark>=4", "pytest-xdist>=3.5", "hypothesis>=6", "pyarrow>=15", "matplotlib>=3.8", TRITON],
    },
)
