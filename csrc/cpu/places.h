// The places of a tile step: where in the grid they are, and where in the caches what belongs to them lies.
#pragma once

#include <cstdint>
#include <vector>

namespace fastvq::cpu {

// How a grid is cut into tiles of columns, see fastvq/sampling/plan/front.py.
struct Front {
    int64_t height, width;
    int64_t tile;    // columns of a tile
    int64_t offset;  // tiles that a row is ahead of the one below it

    int64_t tiles() const { return (width + tile - 1) / tile; }
    int64_t steps() const { return tiles() + offset * (height - 1); }
    // Most rows that have a tile in one step.
    int64_t rows() const;
    // Rows from the top that are complete after a step.
    int64_t complete(int64_t step) const;
    // Tiles that the row `above` above is ahead; no more than there are.
    int64_t ahead(int64_t above) const;
    // Whether what is `right` columns to the right in the row `above` above is done when a tile begins.
    bool reaches(int64_t above, int64_t right) const;
};

// The last rows of one operation's vectors, with zeros beside the grid, and a row of zeros for those above it.
//
// Row r lies in slot r mod `rows`. Whole rows are kept, or, where that is less, of each row only the last columns that
// anything reads: column c in place (c + left) mod `period`, and those of the first places a second time behind the last,
// so that any window lies in one piece.
struct Ring {
    int64_t channels = 0;
    int64_t above = 0, left = 0, right = 0;  // what is read, in rows and columns
    int64_t rows = 0, pitch = 0, period = 0;  // pitch: columns of a slot; period 0 for whole rows

    Ring() = default;
    Ring(const Front& front, int64_t channels, int64_t above, int64_t left, int64_t right);

    int64_t window() const { return left + 1 + right; }
    int64_t floats() const { return (rows * pitch + window()) * channels; }
    int64_t place(int64_t column) const {
        const int64_t at = column + left;
        return period == 0 ? at : at % period;
    }
    // Of a place, whether it has a copy `period` columns on.
    bool twice(int64_t place) const { return place < pitch - period && period > 0; }
    // Where a window of zeros lies.
    int64_t zeros() const { return rows * pitch * channels; }
    // Where a window begins: `row` above the grid is zeros.
    int64_t offset(int64_t row, int64_t column) const {
        return row < 0 ? zeros() : (row % rows * pitch + place(column)) * channels;
    }
};

// Where in a sample's memory something of a place lies: the sum of these.
struct PlaceRule {
    int64_t place = 0, tile = 0, row = 0, column = 0;  // floats per place, tile of the step, row and column of the grid
    const Ring* ring = nullptr;                        // and the window of a ring
    int64_t above = 0, first_column = 0;               // relative to the place
    bool copy = false;  // instead: 0, or how far from a vector of the ring its copy lies

    bool operator==(const PlaceRule& other) const;
};

// The places of one step after the other. A tile's places are numbered one after the other, and so are tiles.
class Places {
   public:
    explicit Places(const Front& front);

    // Number of a rule's table. All rules come before the first step.
    int64_t add(const PlaceRule& rule);
    void begin(int64_t step);

    const int64_t* table(int64_t number) const { return tables_[number].data(); }
    const std::vector<int32_t>& all() const { return all_; }
    // Those that are the column `turn` of their tile.
    const std::vector<int32_t>& at_turn(int64_t turn) const { return turns_[turn]; }
    int64_t row(int64_t place) const { return rows_[place / front_.tile]; }
    int64_t column(int64_t place) const { return columns_[place / front_.tile] + place % front_.tile; }
    int64_t num_tiles() const { return static_cast<int64_t>(rows_.size()); }
    int64_t first_column(int64_t tile) const { return columns_[tile]; }
    int64_t tile_row(int64_t tile) const { return rows_[tile]; }

   private:
    const Front front_;
    std::vector<PlaceRule> rules_;
    std::vector<std::vector<int64_t>> tables_;
    std::vector<int64_t> rows_, columns_;  // of the tiles of this step: row, and first column
    std::vector<int32_t> all_;
    std::vector<std::vector<int32_t>> turns_;
};

}  // namespace fastvq::cpu
