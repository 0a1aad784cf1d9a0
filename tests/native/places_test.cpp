// Fronts, rings and the places of steps, on their own.
#include "cpu/places.h"

#include <limits>
#include <vector>

#include "check.h"
#include "grid_case.h"
#include "tests.h"

namespace fastvq::cpu::testing {
namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

void check_reach() {
    for (int64_t width = 1; width <= 7; ++width) {
        for (int64_t tile = 1; tile <= width; ++tile) {
            for (int64_t offset = 1; offset <= width; ++offset) {
                const Front front{5, width, tile, offset};
                for (int64_t above = 1; above <= 4; ++above) {
                    for (int64_t right = -width - 1; right <= width + 1; ++right) {
                        expect(front.reaches(above, right) == reaches_slowly(front, above, right), "tiles of ", tile,
                               " of ", width, ", offset ", offset, ": ", above, " above, ", right, " to the right");
                    }
                }
            }
        }
    }
}

// One sample's ring, written and cleared as grids are filled.
struct RingCase {
    RingCase(const Front& front, Places& places, int64_t above, int64_t left, int64_t right)
        : front(front), ring(front, 1, above, left, right), data(ring.floats(), kNaN) {
        PlaceRule rule;
        rule.ring = &ring;
        own = places.add(rule);
        rule.copy = true;
        copy = places.add(rule);
        rule.copy = false;
        for (int64_t row = 0; row <= above; ++row) {
            rule.above = row;
            rule.first_column = -left;
            windows.push_back(places.add(rule));
        }
        std::fill(data.begin() + ring.rows * ring.pitch, data.end(), 0.0f);
    }

    void write(int64_t at, int64_t copy_at, float x) { data.at(at) = data.at(at + copy_at) = x; }

    void clear(int64_t row, int64_t first, int64_t last) {
        for (int64_t column = first; column < last; ++column) {
            write(ring.offset(row, column), ring.twice(ring.place(column)) ? ring.period : 0, 0.0f);
        }
    }

    // What stands for a vector; 0 beside the grid.
    float name_of(int64_t row, int64_t column) const {
        const bool beside = row < 0 || column < 0 || column >= front.width;
        return beside ? 0.0f : static_cast<float>(1 + row * front.width + column);
    }

    const Front front;
    const Ring ring;
    std::vector<float> data;
    int64_t own, copy;
    std::vector<int64_t> windows;  // by rows above
};

// Every position comes up once, in the order that the front says, and finds its windows in one piece.
void check_places(Random& random) {
    const int64_t width = 1 + random.below(24), tile = 1 + random.below(width), above = random.below(4);
    const int64_t left = random.below(4), right = random.below(4);
    Front front{1 + random.below(7), width, tile, 1};
    while (above > 0 && !front.reaches(1, right)) ++front.offset;
    Places places(front);
    RingCase ring(front, places, above, left, right);
    std::vector<int> seen(front.height * width);
    int64_t complete = 0;
    for (int64_t step = 0; step < front.steps(); ++step) {
        places.begin(step);
        expect(places.num_tiles() >= 0 && places.num_tiles() <= front.rows(), "more tiles than rows");
        for (int64_t t = 0; t < places.num_tiles(); ++t) {
            if (places.first_column(t) == 0) ring.clear(places.tile_row(t), -left, 0);
            if (places.first_column(t) + tile >= width) ring.clear(places.tile_row(t), width, width + right);
        }
        std::size_t in_turns = 0;
        for (int64_t turn = 0; turn < tile; ++turn) {
            in_turns += places.at_turn(turn).size();
            for (const int32_t place : places.at_turn(turn)) {
                const int64_t row = places.row(place), column = places.column(place);
                expect(column % tile == turn && column / tile + front.offset * row == step, "a place of another step");
                expect(++seen.at(row * width + column) == 1, "a place that comes up twice");
                ring.write(places.table(ring.own)[place], places.table(ring.copy)[place], ring.name_of(row, column));
                for (int64_t a = 0; a <= above; ++a) {
                    const float* window = ring.data.data() + places.table(ring.windows[a])[place];
                    for (int64_t c = -left; c <= (a == 0 ? 0 : right); ++c) {
                        expect(window[c + left] == ring.name_of(row - a, column + c), "another vector in a window of ",
                               width, " columns, tiles of ", tile, ", offset ", front.offset);
                    }
                }
            }
        }
        expect(in_turns == places.all().size(), "places without a turn");
        int64_t rows = 0;
        while (rows < front.height && seen[(rows + 1) * width - 1] == 1) ++rows;
        expect(front.complete(step) == rows && rows >= complete, rows, " rows are complete");
        complete = rows;
    }
    expect(seen == std::vector<int>(seen.size(), 1), "a place that does not come up");
}

void check_rules() {
    const Front front{3, 5, 2, 2};
    Places places(front);
    PlaceRule by_place, by_grid;
    by_place.place = 7;
    by_place.tile = 100;
    by_grid.row = 50;
    by_grid.column = 3;
    const int64_t first = places.add(by_place), second = places.add(by_grid);
    expect(places.add(by_place) == first && first != second, "rules have a table each");
    for (int64_t step = 0; step < front.steps(); ++step) {
        places.begin(step);
        for (const int32_t place : places.all()) {
            expect(places.table(first)[place] == place * 7 + place / 2 * 100, "another place in a tile");
            expect(places.table(second)[place] == places.row(place) * 50 + places.column(place) * 3, "another place");
        }
    }
}

}  // namespace

void test_places() {
    check_reach();
    check_rules();
    Random random(5);
    for (int repeat = 0; repeat < 400; ++repeat) check_places(random);
    // Rings of a front that is steep are much smaller than whole rows.
    const Front front{64, 64, 1, 3};
    const Ring ring(front, 1, 2, 2, 2);
    expect(ring.period > 0 && ring.floats() < (front.rows() + 2) * 20, "a ring of ", ring.floats(), " floats");
}

}  // namespace fastvq::cpu::testing
