#include "cpu/grid_plan.h"

#include <algorithm>
#include <stdexcept>

namespace fastvq::cpu {
namespace {

constexpr int64_t kMaxSize = int64_t{1} << 31;

bool multiplies(const OpSpec& op) { return op.kind == Kind::kAffine || op.kind == Kind::kLookup; }

// Checks of what a plan does before the step phase; check_plan has the rest.
class AboveCheck {
   public:
    AboveCheck(const std::vector<OpSpec>& ops, const std::vector<TermSpec>& terms, const GridShape& shape)
        : ops_(ops), terms_(terms), shape_(shape) {}

    void check(int64_t index) {
        const OpSpec& op = ops_[index];
        index_ = index;
        require(op.kind >= Kind::kLookup && op.kind <= Kind::kStatic, index, "unknown kind");
        require(!op.uniform || op.level < 0, index, "what is the same everywhere is not known before");
        require((op.num_once == 0 || op.kind == Kind::kAffine) && (op.num_above == 0 || multiplies(op)), index,
                "it has no terms");
        const bool before = op.level < 0 && !op.uniform && op.kind != Kind::kStatic;
        require(op.above_level < num_ops() && (op.above_level >= 0) == (before || op.num_above > 0), index,
                "its order above is none");
        require(!multiplies(op) || op.bias != nullptr, index, "it needs a bias");
        if (op.kind == Kind::kAffine) {
            range(op.first_once, op.num_once);
            range(op.first_above, op.num_above);
            require(!op.uniform || op.num_above == 0, index, "what is the same everywhere reads a place");
            for (int64_t t = op.first_once; t < op.first_once + op.num_once; ++t) {
                window(op, terms_[t]);
                require(terms_[t].is_direct() && ops_[terms_[t].source].uniform && terms_[t].source < index, index,
                        "a source is not the same everywhere");
            }
            for (int64_t t = op.first_above; t < op.first_above + op.num_above; ++t) above_term(op, terms_[t]);
        } else if (op.kind == Kind::kLookup) {
            range(op.first_above, op.num_above);
            require(!op.uniform, index, "what is the same everywhere reads codes");
            for (int64_t t = op.first_above; t < op.first_above + op.num_above; ++t) {
                const TermSpec& tap = terms_[t];
                require(tap.source == -1 && tap.num_rows == 1 && tap.num_columns == 1 && tap.first_row < 0 &&
                            tap.first_row > -kMaxSize && tap.first_column > -kMaxSize && tap.first_column < kMaxSize &&
                            tap.weights != nullptr && tap.num_weights / op.channels == shape_.num_codes &&
                            tap.num_weights % op.channels == 0,
                        index, "a tap above needs a table of its size");
            }
        } else if (op.level < 0 && op.kind != Kind::kStatic) {
            element_wise(op);
        }
    }

   private:
    int64_t num_ops() const { return static_cast<int64_t>(ops_.size()); }

    void range(int64_t first, int64_t count) const {
        require(count >= 0 && first >= 0 && first <= static_cast<int64_t>(terms_.size()) - count, index_,
                "terms do not exist");
    }

    void window(const OpSpec& op, const TermSpec& term) const {
        require(term.source >= 0 && term.source < num_ops(), index_, "a source does not exist");
        require(term.num_rows >= 1 && term.num_rows < kMaxSize && term.num_columns >= 1 &&
                    term.num_columns < kMaxSize && term.first_row > -kMaxSize && term.first_row <= 1 - term.num_rows &&
                    term.first_column > -kMaxSize && term.first_column < kMaxSize,
                index_, "a term reads rows that are not known yet");
        require(ops_[term.source].kind != Kind::kStoreKeys, index_, "only attention reads keys");
        const int64_t channels = ops_[term.source].channels, count = term.num_weights;
        require(term.weights != nullptr && count > 0 && count % op.channels == 0 &&
                    count / op.channels % channels == 0 && count / op.channels / channels % term.num_rows == 0 &&
                    count / op.channels / channels / term.num_rows == term.num_columns,
                index_, "a term needs weights of its size");
    }

    // Whether a vector is there, at all places of a tile, before operations of some order above.
    bool known(int64_t source, int64_t above_level) const {
        const OpSpec& from = ops_[source];
        if (from.kind == Kind::kStatic || from.uniform) return true;
        return from.level < 0 && from.above_level < above_level;
    }

    void above_term(const OpSpec& op, const TermSpec& term) const {
        window(op, term);
        const OpSpec& from = ops_[term.source];
        require(term.first_row + term.num_rows <= 0 || known(term.source, op.above_level), index_,
                "a source is not known above");
        require(term.is_direct() || (from.kind != Kind::kStatic && !from.uniform), index_,
                "the past of a source is not kept");
    }

    void element_wise(const OpSpec& op) const {
        require(op.kind != Kind::kAttend && op.kind != Kind::kStoreKeys, index_, "it belongs to the step phase");
        const int64_t wanted = op.kind == Kind::kConcatElu                             ? op.channels / 2
                               : op.kind == Kind::kGlu || op.kind == Kind::kTanh ? 2 * op.channels
                                                                                 : op.channels;
        require(op.kind == Kind::kConcatElu ? op.paired : !((op.kind == Kind::kGlu || op.kind == Kind::kTanh) && op.paired),
                index_, "concatenated halves must be paired, what a gate gives cannot be");
        for (int s = 0; s < num_sources(op); ++s) {
            const int64_t source = op.sources[s];
            require(source >= 0 && source < num_ops(), index_, "a source does not exist");
            require(ops_[source].channels == wanted && (op.kind != Kind::kConcatElu || op.channels % 2 == 0), index_,
                    "channels of a source do not fit");
            require(op.uniform ? ops_[source].uniform && source < index_ : known(source, op.above_level), index_,
                    "a source is not known above");
        }
    }

    const std::vector<OpSpec>& ops_;
    const std::vector<TermSpec>& terms_;
    const GridShape& shape_;
    int64_t index_ = 0;
};

}  // namespace

GridPlan::~GridPlan() = default;

GridPlan::GridPlan(std::vector<OpSpec> specs, std::vector<TermSpec> terms, int64_t output, GridShape shape, bool bf16,
                   const Kernels& kernels)
    : specs_(std::move(specs)), terms_(std::move(terms)), ops_(specs_.size()), pasts_(specs_.size()),
      values_(specs_.size()), above_levels_(1), output_(output), shape_(shape), bf16_(bf16), kernels_(kernels) {
    if (shape.height < 1 || shape.width < 1 || shape.height >= kMaxSize / shape.width) {
        throw std::invalid_argument("shape: expected a grid of 1 to 2^31 positions");
    }
    check_plan(specs_, terms_, output, {1, shape.width, shape.positions(), shape.num_codes, shape.key_stride()});
    check();
    for (int64_t index = 0; index < num_ops(); ++index) {
        const OpSpec& spec = specs_[index];
        Op& op = ops_[index];
        if (spec.level >= 0) {
            levels_.resize(std::max<int64_t>(levels_.size(), spec.level + 1));
            levels_[spec.level].push_back(index);
        }
        if (spec.uniform || spec.num_once > 0) once_.push_back(index);
        if (spec.above_level >= 0 && !spec.uniform) {
            above_levels_.resize(std::max<int64_t>(above_levels_.size(), spec.above_level + 1));
            above_levels_[spec.above_level].push_back(index);
        }
        if (multiplies(spec)) op.bias.assign(spec.bias, spec.bias + spec.channels);
        if (spec.kind == Kind::kAffine) {
            op.once = pack(spec, spec.first_once, spec.num_once);
            op.above = pack(spec, spec.first_above, spec.num_above);
            op.step = pack(spec, spec.first_term, spec.level >= 0 ? spec.num_terms : 0);
        }
        if (spec.kind == Kind::kLookup) {
            for (int64_t t = spec.first_above; t < spec.first_above + spec.num_above; ++t) {
                op.above_table.insert(op.above_table.end(), terms_[t].weights, terms_[t].weights + terms_[t].num_weights);
            }
            if (spec.level >= 0) op.step_table.assign(spec.weights, spec.weights + spec.num_weights);
        }
        weight_bytes_ += static_cast<int64_t>((op.bias.size() + op.above_table.size() + op.step_table.size()) * 4);
        if (spec.kind == Kind::kAttend) values_[spec.sources[2]] = true;
    }
    for (int64_t index = 0; index < num_ops(); ++index) {
        require(!(values_[index] && pasts_[index].kept), index, "attention and windows read its past");
    }
    // The caller's arrays may be gone from here on.
    for (OpSpec& op : specs_) op.weights = op.bias = nullptr;
    for (TermSpec& term : terms_) term.weights = nullptr;
}

std::unique_ptr<PackedProduct> GridPlan::pack(const OpSpec& op, int64_t first, int64_t count) {
    if (count == 0) return nullptr;
    std::vector<PackedProduct::Matrix> matrices;
    for (int64_t t = first; t < first + count; ++t) {
        matrices.push_back({terms_[t].weights, terms_[t].num_weights / op.channels});
        const TermSpec& term = terms_[t];
        if (term.is_direct()) continue;
        Past& past = pasts_[term.source];
        past.kept = true;
        past.above = std::max(past.above, -term.first_row);
        past.left = std::max(past.left, -term.first_column);
        past.right = std::max(past.right, term.first_column + term.num_columns - 1);
    }
    auto packed = std::make_unique<PackedProduct>(matrices, op.channels, op.paired ? 2 : 1, bf16_, kernels_);
    weight_bytes_ += packed->weight_bytes();
    return packed;
}

void GridPlan::check() const {
    AboveCheck above(specs_, terms_, shape_);
    for (int64_t index = 0; index < num_ops(); ++index) above.check(index);
    for (int64_t index = 0; index < num_ops(); ++index) {
        const OpSpec& op = specs_[index];
        for (int64_t t = op.first_term; op.kind == Kind::kAffine && op.level >= 0 && t < op.first_term + op.num_terms;
             ++t) {
            const TermSpec& term = terms_[t];
            const OpSpec& from = specs_[term.source];
            require(term.first_row == 0 && term.num_rows == 1, index, "a step reads rows above");
            require(from.kind != Kind::kStoreKeys, index, "only attention reads keys");
            require(term.is_direct() || (from.kind != Kind::kStatic && !from.uniform), index,
                    "the past of a source is not kept");
        }
        for (int s = 0; s < num_sources(op); ++s) {
            const bool keys = op.kind == Kind::kAttend && s == 1;
            require(op.kind == Kind::kStatic || keys || specs_[op.sources[s]].kind != Kind::kStoreKeys, index,
                    "only attention reads keys");
        }
        for (int s = 0; op.kind == Kind::kAttend && s < 3; ++s) {
            require(specs_[op.sources[s]].level >= 0, index, "attention reads what is known before");
        }
    }
}

Front GridPlan::front_of(int64_t tile, int64_t offset) const {
    const auto refuse = [](const char* what) { throw std::invalid_argument(what); };
    if (tile < 1 || tile > shape_.width) refuse("tile: expected 1 to the width of the grid");
    if (offset < 1 || offset > shape_.width) refuse("offset: expected 1 to the width of the grid");
    const Front front{shape_.height, shape_.width, tile, offset};
    for (const OpSpec& op : specs_) {
        if (op.kind == Kind::kAttend && front.tiles() > 1) refuse("tile: attention reads all positions before");
        for (int64_t t = op.first_above; multiplies(op) && t < op.first_above + op.num_above; ++t) {
            const TermSpec& term = terms_[t];
            const int64_t right = term.first_column + term.num_columns - 1;
            for (int64_t row = 0; row < term.num_rows; ++row) {
                const int64_t above = -(term.first_row + row);
                const bool own_row = above == 0 && right > 0 && front.tiles() > 1;
                if (own_row || (above > 0 && !front.reaches(above, right))) {
                    refuse("offset: a position would be read before it is known");
                }
            }
        }
    }
    return front;
}

}  // namespace fastvq::cpu
