#include "cpu/places.h"

#include <algorithm>

namespace fastvq::cpu {

int64_t Front::rows() const { return std::min(height, (tiles() + offset - 1) / offset); }

int64_t Front::complete(int64_t step) const {
    const int64_t since = step - tiles() + 1;
    return since < 0 ? 0 : std::min(height, since / offset + 1);
}

int64_t Front::ahead(int64_t above) const {
    return above >= (tiles() + offset - 1) / offset ? tiles() : offset * above;
}

bool Front::reaches(int64_t above, int64_t right) const {
    // All columns of the tiles that the row above is ahead are done. No tile needs more than the first.
    return ahead(above) * tile >= std::min(width, tile + right);
}

Ring::Ring(const Front& front, int64_t channels, int64_t above, int64_t left, int64_t right)
    : channels(channels), above(above), left(left), right(right), rows(front.rows() + above) {
    // From the oldest column that the lowest row reads to the last one of the tile in the highest.
    const int64_t span = (front.ahead(above) + 1) * front.tile + left + right;
    pitch = front.width + left + right;
    if (front.tiles() > 1 && span + window() - 1 < pitch) {
        period = span;
        pitch = span + window() - 1;
    }
}

bool PlaceRule::operator==(const PlaceRule& other) const {
    const auto same_ring = [](const Ring* a, const Ring* b) {
        if (a == nullptr || b == nullptr) return a == b;
        return a->channels == b->channels && a->above == b->above && a->left == b->left && a->right == b->right;
    };
    return place == other.place && tile == other.tile && row == other.row && column == other.column &&
           above == other.above && first_column == other.first_column && copy == other.copy &&
           same_ring(ring, other.ring);
}

Places::Places(const Front& front) : front_(front), turns_(front.tile) {
    const int64_t most = front.rows() * front.tile;
    all_.reserve(most);
    rows_.reserve(front.rows());
    columns_.reserve(front.rows());
    for (auto& turn : turns_) turn.reserve(front.rows());
}

int64_t Places::add(const PlaceRule& rule) {
    const auto found = std::find(rules_.begin(), rules_.end(), rule);
    if (found == rules_.end()) {
        rules_.push_back(rule);
        tables_.emplace_back(front_.rows() * front_.tile);
        return static_cast<int64_t>(rules_.size()) - 1;
    }
    return found - rules_.begin();
}

void Places::begin(int64_t step) {
    rows_.clear();
    columns_.clear();
    all_.clear();
    for (auto& turn : turns_) turn.clear();
    const int64_t late = step - front_.tiles() + 1;
    const int64_t first = late <= 0 ? 0 : (late + front_.offset - 1) / front_.offset;
    const int64_t last = std::min(front_.height - 1, step / front_.offset);
    for (int64_t row = first; row <= last; ++row) {
        const int64_t column = (step - front_.offset * row) * front_.tile, tile = num_tiles();
        rows_.push_back(row);
        columns_.push_back(column);
        for (int64_t turn = 0; turn < std::min(front_.tile, front_.width - column); ++turn) {
            const auto place = static_cast<int32_t>(tile * front_.tile + turn);
            all_.push_back(place);
            turns_[turn].push_back(place);
        }
    }
    for (std::size_t i = 0; i < rules_.size(); ++i) {
        const PlaceRule& rule = rules_[i];
        for (const int32_t p : all_) {
            const int64_t r = row(p), c = column(p);
            int64_t& offset = tables_[i][p];
            if (rule.copy) {
                offset = rule.ring->twice(rule.ring->place(c)) ? rule.ring->period * rule.ring->channels : 0;
                continue;
            }
            offset = p * rule.place + p / front_.tile * rule.tile + r * rule.row + c * rule.column;
            if (rule.ring != nullptr) offset += rule.ring->offset(r - rule.above, c + rule.first_column);
        }
    }
}

}  // namespace fastvq::cpu
