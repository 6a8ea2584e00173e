#include "cpu/pack.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <string>
#include <vector>

#include "ops/common.h"

namespace vdit {
namespace {

using Tensors = std::vector<Tensor>;
using Ints = std::vector<int64_t>;

constexpr int64_t kElementsPerTask = 1 << 15;

std::string numbers(const Ints& values) {
  std::string text = "[";
  for (size_t i = 0; i < values.size(); ++i) text += (i > 0 ? ", " : "") + std::to_string(values[i]);
  return text + "]";
}

// What both directions share: the slices of tensors of these sizes, [B, N, H, D] each, and where they lie. Returns the
// bytes of the buffer.
int64_t lay_out(PackParams& p, const std::string& op, const std::vector<Ints>& shapes, const Ints& sizes, int64_t dim,
                int64_t compression, int64_t block) {
  const auto count = static_cast<int64_t>(shapes.size());
  VDIT_CHECK(count >= 1 && count <= kPackMaxTensors, op, ": ", count, " tensors; pass 1 to ", kPackMaxTensors);
  VDIT_CHECK(dim == 1 || dim == 2, op, ": dim is ", dim, "; expected 1 (rows) or 2 (heads)");
  VDIT_CHECK(compression >= 0 && compression <= 2, op, ": compression is ", compression, "; expected 0, 1 or 2");
  VDIT_CHECK(block == 32 || block == 64 || block == 128, op, ": block is ", block, "; expected 32, 64 or 128");
  const auto total = static_cast<int64_t>(sizes.size());
  VDIT_CHECK(total > 0 && total % count == 0 && total / count <= kPackMaxSlices, op, ": ", total, " sizes for ", count,
             " tensors; expected the same number for each, at most ", kPackMaxSlices);
  p.tensors = int32_t(count);
  p.slices = int32_t(total / count);
  p.cut_heads = dim == 2 ? 1 : 0;
  p.format = static_cast<PackFormat>(compression);
  p.block = int32_t(block);
  p.batch = int32_t(shapes[0][0]);
  for (int64_t i = 0; i < count; ++i) {
    const Ints& shape = shapes[size_t(i)];
    int64_t elements = 1;
    for (const int64_t n : shape) {
      VDIT_CHECK(n >= 0 && n < (int64_t{1} << 31), op, ": tensor ", i, " has shape ", numbers(shape),
                 "; sizes must be 0 to 2^31 - 1");
      elements *= std::max<int64_t>(n, 1);
      VDIT_CHECK(elements < (int64_t{1} << 31), op, ": tensor ", i, " has shape ", numbers(shape),
                 "; at most 2^31 - 1 elements");
    }
    VDIT_CHECK(shape[0] == shapes[0][0], op, ": tensor ", i, " has shape ", numbers(shape), " but tensor 0 has ",
               numbers(shapes[0]), "; the batch must be the same");
    PackTensor& t = p.tensor[i];
    t.rows = int32_t(shape[1]);
    t.heads = int32_t(shape[2]);
    t.dim = int32_t(shape[3]);
    int64_t sum = 0;
    for (int32_t s = 0; s < p.slices; ++s) {
      const int64_t size = sizes[size_t(i * p.slices + s)];
      VDIT_CHECK(size >= 0 && size <= shape[size_t(dim)] - sum, op, ": sizes ", numbers(sizes), " do not add up to ",
                 shape[size_t(dim)], ", dimension ", dim, " of tensor ", i);
      t.start[s] = int32_t(sum);
      sum += size;
    }
    VDIT_CHECK(sum == shape[size_t(dim)], op, ": sizes ", numbers(sizes), " do not add up to ", shape[size_t(dim)],
               ", dimension ", dim, " of tensor ", i);
    t.start[p.slices] = int32_t(sum);
  }
  int64_t at = 0;
  for (int32_t s = 0; s < p.slices; ++s) {
    for (int32_t i = 0; i < p.tensors; ++i) {
      PackTensor& t = p.tensor[i];
      t.offset[s] = at;
      const PackSlice slice = pack_slice(p, i, s);
      const int64_t heads = int64_t{p.batch} * slice.rows * slice.heads, elements = heads * t.dim;
      if (p.format == PackFormat::e4m3) {
        at += pack_aligned(elements) + pack_aligned(heads * ((t.dim + block - 1) / block));
      } else {
        at += elements * (p.format == PackFormat::bf16 ? 2 : p.element);
      }
    }
  }
  return at;
}

Ints shape_of(const Tensor& t) {
  Ints shape(t.sizes().begin(), t.sizes().end());
  if (shape.size() == 3) shape.insert(shape.begin() + 2, 1);  // [B, N, C] has one head
  return shape;
}

// Where a tensor lies; strides of dimensions of one element are those of a contiguous tensor.
void point_at(PackTensor& t, const Tensor& x, int32_t element, void* data) {
  t.data = static_cast<char*>(data);
  const bool heads = x.dim() == 4;
  const int64_t last = x.dim() - 1;
  const auto stride = [&](int64_t d, int64_t otherwise) { return x.size(d) > 1 ? x.stride(d) * element : otherwise; };
  t.channel = stride(last, element);
  t.head = int64_t{t.dim} * element;
  if (heads) t.head = stride(2, t.head);
  t.row = stride(1, int64_t{t.heads} * t.dim * element);
  t.batch = stride(0, int64_t{t.rows} * t.heads * t.dim * element);
}

PackParams prepare_pack(const Tensors& x, const Ints& sizes, int64_t dim, int64_t compression, int64_t block,
                        Tensor& buffer) {
  VDIT_CHECK(!x.empty(), "pack_slices: no tensors; pass 1 to ", kPackMaxTensors);
  PackParams p{};
  std::vector<Ints> shapes;
  for (size_t i = 0; i < x.size(); ++i) {
    VDIT_CHECK(x[i].dim() == 3 || x[i].dim() == 4, "pack_slices: x[", i, "] has shape ", shape_text(x[i]),
               "; expected [B, N, C] or [B, N, H, D]");
    VDIT_CHECK(dim != 2 || x[i].dim() == 4, "pack_slices: dim is 2 but x[", i, "] has shape ", shape_text(x[i]),
               "; expected [B, N, H, D]");
    VDIT_CHECK(x[i].scalar_type() == x[0].scalar_type(), "pack_slices: x[", i, "] is ", dtype_text(x[i].scalar_type()),
               " but x[0] is ", dtype_text(x[0].scalar_type()), "; convert them to one dtype");
    VDIT_CHECK(same_device(x[i], x[0]), "pack_slices: x[", i, "] is on ", device_text(x[i]), " but x[0] is on ",
               device_text(x[0]));
    shapes.push_back(shape_of(x[i]));
  }
  p.element = int32_t(x[0].element_size());
  if (compression != 0) p.dtype = kernel_dtype(x[0], "pack_slices: x");
  if (compression == 1 && p.dtype == DType::bf16) compression = 0;  // it is already
  const int64_t bytes = lay_out(p, "pack_slices", shapes, sizes, dim, compression, block);
  for (size_t i = 0; i < x.size(); ++i) {
    PackTensor& t = p.tensor[i];
    point_at(t, x[i], p.element, const_cast<void*>(x[i].const_data_ptr()));  // read only
    VDIT_CHECK(compression == 0 || t.channel == p.element, "pack_slices: x[", i, "] has stride ", t.channel / p.element,
               " in its last dimension; with compression it must be contiguous there: call "
               ".contiguous()");
  }
  const ScalarType type = p.format == PackFormat::e4m3   ? ScalarType::Byte
                          : p.format == PackFormat::bf16 ? ScalarType::BFloat16
                                                         : x[0].scalar_type();
  const int64_t size = p.format == PackFormat::e4m3 ? 1 : p.format == PackFormat::bf16 ? 2 : p.element;
  buffer = torch::stable::new_empty(x[0], {bytes / size}, type);
  p.buffer = static_cast<char*>(buffer.mutable_data_ptr());
  return p;
}

PackParams prepare_unpack(const Tensor& buffer, const Ints& shapes, const Ints& sizes, int64_t dim, int64_t compression,
                          int64_t block, int64_t dtype, Tensors& x) {
  VDIT_CHECK(buffer.dim() == 1 && buffer.is_contiguous(), "unpack_slices: buffer has shape ", shape_text(buffer),
             "; expected one contiguous dimension");
  VDIT_CHECK(!shapes.empty() && shapes.size() % 4 == 0, "unpack_slices: shapes has ", shapes.size(),
             " numbers; expected four per tensor");
  constexpr ScalarType kTypes[] = {ScalarType::Float, ScalarType::Half, ScalarType::BFloat16};
  VDIT_CHECK(dtype >= 0 && dtype < 3, "unpack_slices: dtype is ", dtype, "; expected 0, 1 or 2");
  const ScalarType wanted = compression == 2 ? ScalarType::Byte : ScalarType::BFloat16;
  VDIT_CHECK(compression == 0 || buffer.scalar_type() == wanted, "unpack_slices: buffer is ",
             dtype_text(buffer.scalar_type()), "; expected ", dtype_text(wanted), " with this compression");
  const ScalarType type = compression == 0 ? buffer.scalar_type() : kTypes[dtype];
  PackParams p{};
  p.dtype = static_cast<DType>(dtype);
  const auto buffer_element = static_cast<int64_t>(buffer.element_size());
  p.element = int32_t(compression == 0 ? buffer_element : type == ScalarType::Float ? 4 : 2);
  if (compression == 1 && p.dtype == DType::bf16) compression = 0;
  std::vector<Ints> each;
  for (size_t i = 0; i < shapes.size(); i += 4)
    each.emplace_back(shapes.begin() + long(i), shapes.begin() + long(i) + 4);
  const int64_t bytes = lay_out(p, "unpack_slices", each, sizes, dim, compression, block);
  VDIT_CHECK(bytes == buffer.numel() * buffer_element, "unpack_slices: buffer has ", buffer.numel(),
             " elements; expected ", bytes / buffer_element, " for shapes ", numbers(shapes));
  p.buffer = const_cast<char*>(static_cast<const char*>(buffer.const_data_ptr()));  // read only
  for (size_t i = 0; i < each.size(); ++i) {
    x.push_back(torch::stable::new_empty(buffer, each[i], type));
    point_at(p.tensor[i], x[i], p.element, x[i].mutable_data_ptr());
  }
  return p;
}

template <class Run>
void over_slices(const PackParams& p, Run run) {
  for (int32_t s = 0; s < p.slices; ++s) {
    for (int32_t i = 0; i < p.tensors; ++i) {
      const PackSlice slice = pack_slice(p, i, s);
      const int64_t row = int64_t{slice.heads} * p.tensor[i].dim;
      if (row == 0) continue;
      torch::stable::parallel_for(0, int64_t{p.batch} * slice.rows, std::max<int64_t>(1, kElementsPerTask / row),
                                  [&](int64_t first, int64_t last) { run(p, i, s, first, last); });
    }
  }
}

Tensor pack_slices_cpu(const Tensors& x, const Ints& sizes, int64_t dim, int64_t compression, int64_t block) {
  Tensor buffer;
  const PackParams p = prepare_pack(x, sizes, dim, compression, block, buffer);
  over_slices(p, cpu_pack_rows);
  return buffer;
}

Tensors unpack_slices_cpu(const Tensor& buffer, const Ints& shapes, const Ints& sizes, int64_t dim, int64_t compression,
                          int64_t block, int64_t dtype) {
  Tensors x;
  const PackParams p = prepare_unpack(buffer, shapes, sizes, dim, compression, block, dtype, x);
  over_slices(p, cpu_unpack_rows);
  return x;
}

#ifdef VDIT_CUDA
Tensor pack_slices_cuda(const Tensors& x, const Ints& sizes, int64_t dim, int64_t compression, int64_t block) {
  VDIT_CHECK(!x.empty(), "pack_slices: no tensors; pass 1 to ", kPackMaxTensors);
  const int32_t device = x[0].get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  Tensor buffer;
  const PackParams p = prepare_pack(x, sizes, dim, compression, block, buffer);
  check_cuda(cuda_pack_slices(p, current_cuda_stream(device)), "pack_slices");
  return buffer;
}

Tensors unpack_slices_cuda(const Tensor& buffer, const Ints& shapes, const Ints& sizes, int64_t dim,
                           int64_t compression, int64_t block, int64_t dtype) {
  const int32_t device = buffer.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  Tensors x;
  const PackParams p = prepare_unpack(buffer, shapes, sizes, dim, compression, block, dtype, x);
  check_cuda(cuda_unpack_slices(p, current_cuda_stream(device)), "unpack_slices");
  return x;
}
#else
Tensor pack_slices_cuda(const Tensors&, const Ints&, int64_t, int64_t, int64_t) { fail_without_cuda("pack_slices"); }
Tensors unpack_slices_cuda(const Tensor&, const Ints&, const Ints&, int64_t, int64_t, int64_t, int64_t) {
  fail_without_cuda("unpack_slices");
}
#endif

}  // namespace
}  // namespace vdit

STABLE_TORCH_LIBRARY_IMPL(vdit_fast, CPU, m) {
  m.impl("pack_slices", TORCH_BOX(&vdit::pack_slices_cpu));
  m.impl("unpack_slices", TORCH_BOX(&vdit::unpack_slices_cpu));
}
STABLE_TORCH_LIBRARY_IMPL(vdit_fast, CUDA, m) {
  m.impl("pack_slices", TORCH_BOX(&vdit::pack_slices_cuda));
  m.impl("unpack_slices", TORCH_BOX(&vdit::unpack_slices_cuda));
}
