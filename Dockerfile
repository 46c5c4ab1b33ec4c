# Everything that `make study` and `make test` need is installed when the image is built; both then run offline:
#   docker build -t mllm_compress . && docker run --rm --network none mllm_compress
FROM python:3.11-slim
RUN apt-get update -qq && apt-get install -qq -y --no-install-recommends make git && rm -rf /var/lib/apt/lists/*
WORKDIR /mllm_compress
COPY . .
RUN make setup
ENV OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE
CMD ["make", "study"]
