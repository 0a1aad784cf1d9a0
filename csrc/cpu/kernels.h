// The arithmetic of the engines, compiled once for each instruction set and chosen at run time.
#pragma once

#include <cstdint>

namespace fastvq::cpu {

// Channels that a thread owns are a multiple of this many, whatever the instruction set.
constexpr int64_t kPanel = 32;

// One query against the positions so far. Keys are [channel][position], values [position][channel].
struct Attend {
    const float* query;
    const float* keys;
    int64_t key_stride;
    const float* values;
    int64_t value_stride;
    int64_t count;  // positions
    int64_t key_width;
    int64_t value_width;
    float* scores;  // work space, count rounded up to a multiple of 16
    float* out;     // zeros when count is 0
};

constexpr int64_t kMostPanelRows = 32;
// Rows behind those that are summed whose numbers are read, to fetch them early.
constexpr int64_t kLookAhead = 8;

// How the elements of a matrix are stored.
enum class Element { kFloat32, kBFloat16, kFloat16 };

// Kernels of the search for nearest codes (nearest.h). A panel is a set of panel_rows vectors stored [depth][panel_rows],
// a tile a set of tile_codes codes stored [depth][tile_codes].
// At least the lanes of any instruction set.
constexpr int64_t kSumPitch = 16;

struct NearestKernels {
    int64_t panel_rows;
    int64_t tile_codes;
    // panel = rows of x minus shift; vectors that do not exist are zeros. stride: elements between rows.
    void (*pack_rows)(const void* x, Element element, int64_t stride, int64_t rows, int64_t depth, const float* shift,
                      float* panel);
    // tile = shift minus codes, zeros for those that do not exist; half_norms[k] = |shift - code k|^2 / 2.
    void (*pack_codes)(const float* codes, int64_t count, int64_t depth, const float* shift, float* tile,
                       float* half_norms);
    // For every vector of the panel the least of its `best` and start[k] + sum over d of tile[d][k] * panel[d] for the
    // codes k of some tiles, numbered from `first`, and in `index` the first code that reaches it. NaN is never least.
    void (*scan)(const float* panel, const float* tiles, const float* start, int64_t depth, int64_t num_tiles,
                 int32_t first, float* best, int32_t* index);
    // Sum over rows n of |x_n - code index[n]|^2, without those where mask is 0 unless it is null. Lanes are added up in
    // float within a row and in double over rows.
    double (*squared_distances)(const void* x, Element element, int64_t stride, int64_t rows, int64_t depth,
                                const float* codes, const int64_t* index, const uint8_t* mask);
    // sums[d] = sum over i < count of x[order[i]][d], in this order and in double. Of `order` kLookAhead numbers more are
    // read, which must be those of rows.
    void (*sum_rows)(const void* x, Element element, int64_t stride, const int64_t* order, int64_t count, int64_t depth,
                     float* sums);
    // For every row n of which code[n] is not negative: sums[code[n]][d] += x[n][d], in rows of `pitch` numbers, a multiple
    // of kSumPitch, and ++counts[code[n]].
    void (*scatter_rows)(const void* x, Element element, int64_t stride, const int32_t* code, int64_t rows,
                         int64_t depth, int64_t pitch, double* sums, int64_t* counts);
    // sums[d] += x[d].
    void (*add)(const void* x, Element element, int64_t depth, double* sums);
    // squares[k] = |code k - shift|^2, of differences in float.
    void (*squares)(const float* codes, int64_t count, int64_t depth, const float* shift, double* squares);
};

// Vectors of floats by sample and place: a table says where those of a place lie within a sample, and without one all of
// a sample's places share one vector.
template <class T>
struct Placed {
    T* data;
    int64_t sample_stride;
    const int64_t* places;

    T* at(int64_t sample, int64_t place) const {
        return data + sample * sample_stride + (places == nullptr ? 0 : places[place]);
    }
};

// `length` floats of every row of a product's left side.
struct Run {
    Placed<const float> rows;
    int64_t length;
    int64_t zeros = -1;  // where `places` says that a row has zeros alone; -1 if it never does
};

// Floats that lie in a line of the caches, by which what is needed soon is fetched.
constexpr int64_t kLineFloats = 16;

// A few rows and the columns of a panel, over a part of the depth. Rows go through the places of one sample after the
// other.
struct ProductTile {
    const Run* runs;  // from the one that the part begins in
    int64_t skip;     // floats of that run before the part
    int64_t depth;    // of the part
    const void* panel;  // its weights, [depth][columns of a panel]
    int64_t pitch;      // weights from a panel to the next
    bool bf16;          // weights are the upper halves of floats
    Placed<const float> start;  // what is added to; zeros if there is no data
    Placed<float> out;
    const int32_t* order;  // the places of a sample
    int64_t width;         // how many
    int64_t sample, position;  // of the first row; the others follow
    int64_t rows;
    int64_t columns;  // that exist; with no more than `few_rows` rows up to those of two panels
    const char* ahead;  // what is needed soon
    int64_t ahead_lines;
};

// Kernels of products (product.h).
struct ProductKernels {
    int64_t rows;      // most rows of a tile
    int64_t few_rows;  // so many take two panels at a time
    int64_t columns;   // of a panel
    bool fused;        // products and sums are rounded together: sets that say so give the same bits
    void (*tile)(const ProductTile&);
};

struct Kernels {
    const char* name;
    void (*elu)(const float* x, float* y, int64_t n);
    void (*elu_negated)(const float* x, float* y, int64_t n);  // elu(-x)
    void (*relu)(const float* x, float* y, int64_t n);
    void (*add)(const float* a, const float* b, float* y, int64_t n);
    void (*glu)(const float* a, const float* b, float* y, int64_t n);   // a * sigmoid(b)
    void (*tanh)(const float* a, const float* b, float* y, int64_t n);  // tanh(a) * sigmoid(b)
    void (*attend)(const Attend&);
    NearestKernels nearest;
    ProductKernels gathered;
};

extern const Kernels kBaselineKernels;
#ifdef FASTVQ_X86_KERNELS
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#endif

// The kernels of a name ("avx512", "avx2", "baseline"), or of the widest set that this processor has for "auto"; null
// if there are none of that name or the processor cannot run them.
const Kernels* find_kernels(const char* name);

}  // namespace fastvq::cpu
