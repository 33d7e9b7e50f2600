# The image of every step, on GPUs and CPUs: docker build --tag REGISTRY/posttrain:VERSION .
# Metaflow brings the code of flows, steps and library with every run; the image holds what they import.
# For EFA between nodes build on an image that has libfabric and aws-ofi-nccl: --build-arg BASE=...
ARG BASE=python:3.12-slim-bookworm
FROM ${BASE}

# Triton compiles its launchers with a C compiler at run time.
RUN apt-get update \
 && apt-get install --yes --no-install-recommends g++ \
 && rm -rf /var/lib/apt/lists/*

# torch's wheel for Linux brings CUDA; the host brings the driver.
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY constraints/gpu.txt constraints/gpu.txt
COPY lib lib
COPY steps steps
COPY flows flows
COPY configs configs
COPY docs/config.md docs/config.md
RUN pip install --no-cache-dir --constraint constraints/gpu.txt ".[vllm,kubernetes,tracking,eval]"

# Else every container would ask PyPI for boto3 before its task.
ENV METAFLOW_SKIP_INSTALL_DEPENDENCIES=1 \
    PYTHONUNBUFFERED=1 \
    TOKENIZERS_PARALLELISM=false

# Metaflow unpacks the code where the container starts, so that folder is the user's own.
RUN useradd --create-home --uid 1000 posttrain
USER 1000
WORKDIR /home/posttrain
