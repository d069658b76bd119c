"""python -m adapter.doctor, also as ranks: deepspeed --module adapter.doctor."""

from adapter.doctor.main import start

if __name__ == "__main__":
    start()
