# autoseg in a container, for a CPU or an NVIDIA GPU:
#   docker build -t autoseg .                           docker build --build-arg DEVICE=cuda -t autoseg:cuda .
#   docker run --rm -v "$PWD:/work" --user "$(id -u):$(id -g)" autoseg run       (GPU: --gpus all --ipc=host)
# and with a packed model inside, as challenges want it (see examples/grand_challenge/README.md):
#   docker build --target challenge --build-arg MODEL=model.zip -t segment .
# The base image is pinned by its tag: its digest could not be looked up where this was written.
ARG PYTHON=3.12-slim-bookworm

FROM python:${PYTHON} AS build
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY autoseg autoseg
COPY templates templates
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:${PYTHON} AS runtime
ARG DEVICE=cpu
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY constraints.txt /opt/constraints.txt
# PyPI's build of torch is that for CUDA, with CUDA's libraries; that for CPUs has an index of its own, and is much smaller.
RUN case "$DEVICE" in \
        cpu) index="https://download.pytorch.org/whl/cpu" ;; \
        cuda) index="https://pypi.org/simple" ;; \
        *) echo "DEVICE: expected cpu or cuda, found $DEVICE" >&2; exit 2 ;; \
    esac \
    && pip install --no-cache-dir --index-url "$index" "$(grep '^torch==' /opt/constraints.txt)"
COPY --from=build /wheels /wheels
RUN pip install --no-cache-dir -c /opt/constraints.txt "$(echo /wheels/*.whl)[formats]" \
    && useradd --create-home --uid 1000 autoseg \
    && mkdir /work && chown autoseg /work
USER 1000
WORKDIR /work
# Not the memory, the disk and the GPU, which a run at work may take.
HEALTHCHECK --interval=5m --timeout=60s CMD ["autoseg", "doctor", "--installed", "--folder", "/tmp"]
ENTRYPOINT ["autoseg"]
CMD ["--help"]

FROM runtime AS challenge
ARG MODEL=model.zip
COPY ${MODEL} /opt/model/model.zip
COPY examples/grand_challenge/segment.py /opt/segment.py
ENTRYPOINT ["python", "/opt/segment.py"]
CMD []

# Without --target the image for all commands is built.
FROM runtime
