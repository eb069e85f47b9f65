# The environment of the tests: `docker build -t rwkvx-jax .` for a CPU, with --build-arg EXTRA=tpu or
# EXTRA=cuda for accelerators. Versions are those of constraints/py312.txt.
FROM python:3.12-slim

ARG EXTRA=""
WORKDIR /app
RUN apt-get update && apt-get install --no-install-recommends -y git && rm -rf /var/lib/apt/lists/*

# Dependencies first, so that a change of the code does not install them again.
COPY requirements.txt constraints/py312.txt ./
RUN pip install --no-cache-dir --requirement requirements.txt --constraint py312.txt

COPY . .
RUN pip install --no-cache-dir --editable ".[tokenizer${EXTRA:+,$EXTRA}]" gcsfs \
    --constraint constraints/py312.txt

CMD ["python", "-m", "rwkvx_jax.doctor"]
