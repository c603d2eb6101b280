# What a pod runs: docker build --tag IMAGE . (docs/launching.md has the lines for Google Cloud).
# For GPUs: --build-arg EXTRAS=cuda12,gcs,quickstart --build-arg CONSTRAINTS=constraints/py311.txt
FROM python:3.11-slim

ARG EXTRAS=tpu,gcs,quickstart
ARG CONSTRAINTS=constraints/tpu.txt

WORKDIR /rlhfjax
COPY . .
RUN pip install --no-cache-dir --constraint "$CONSTRAINTS" --editable ".[$EXTRAS]"
