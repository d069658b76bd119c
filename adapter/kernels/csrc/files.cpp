// Many short reads of one file at regular distances: the columns of a matrix that lies in it row by row.

#include <ATen/ATen.h>
#include <torch/library.h>

#include <cerrno>
#include <unistd.h>

namespace {

// Fill `out` (uint8 [rows, length], contiguous): its row r with the bytes from offset + r * stride of file `fd`.
// -> the bytes read; fewer than out has where the file ends before, -errno where a read fails.
int64_t read_rows(int64_t fd, int64_t offset, int64_t stride, at::Tensor& out) {
  TORCH_CHECK(out.dim() == 2 && out.is_contiguous() && out.scalar_type() == at::kByte, "uint8 [rows, length] is needed");
  const int64_t rows = out.size(0), length = out.size(1);
  uint8_t* to = out.mutable_data_ptr<uint8_t>();
  for (int64_t r = 0; r < rows; r++)
    for (int64_t done = 0; done < length;) {
      const ssize_t got = pread(int(fd), to + r * length + done, length - done, offset + r * stride + done);
      if (got < 0 && errno == EINTR) continue;
      if (got < 0) return -errno;
      if (got == 0) return r * length + done;
      done += got;
    }
  return rows * length;
}

TORCH_LIBRARY_FRAGMENT(qwenvl_tp, m) {
  m.def("read_rows(int fd, int offset, int stride, Tensor(a!) out) -> int", read_rows);
}

}  // namespace
